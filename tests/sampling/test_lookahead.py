"""Draft far where drafts stand and the expert is dear, and not where they fall."""

import itertools

import pytest
import torch

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance
from trl_selective.sampling import speculative
from trl_selective.sampling.lookahead import FIRST_LENGTHS, Lookahead


def trained(acceptance: float, intercept: float, slope: float, max_length: int = 16, rounds: int = 100) -> Lookahead:
    """After rounds in which every draft was at stake and fell with 1 - `acceptance`, and the expert cost `intercept + slope K` policy
    forwards."""
    lookahead = Lookahead(max_length)
    for _ in range(rounds):
        observe(lookahead, length_of_next(lookahead), acceptance, intercept, slope)
    return lookahead


def length_of_next(lookahead: Lookahead) -> int:
    """Of a round of one row in which every draft is at stake."""
    length, reach = 1, 1 - lookahead.risk
    while lookahead.goes_on(length, reach):
        length, reach = length + 1, reach * (1 - lookahead.risk)
    return length


def observe(lookahead: Lookahead, length: int, acceptance: float, intercept: float, slope: float) -> None:
    """A round as it is on average. The drafts that were come to are 1 + a + ... + a^(K-1)."""
    judged = sum(acceptance**k for k in range(length))
    lookahead.observe(
        length,
        judged,
        num_at_stake=round(1000 * judged),
        num_rejected=round(1000 * judged * (1 - acceptance)),
        policy_seconds=0.01 * length,  # 0.01 seconds a policy forward: only the ratio may count
        rest_seconds=0.01 * (intercept + slope * length),
    )


@pytest.mark.parametrize(
    ("acceptance", "intercept", "expected"),
    [
        # tokens per cost, (1 + a + ... + a^(K-1)) / (K + c). With a = 1/2, c = 2:
        # 1/3 = 0.333, 1.5/4 = 0.375, 1.75/5 = 0.35
        (0.5, 2.0, 2),
        # c = 0.9: 1/1.9 = 0.526, 1.5/2.9 = 0.517
        (0.5, 0.9, 1),
        # c = 6: 1/7 = 0.143, 1.5/8 = 0.1875, 1.75/9 = 0.194, 1.875/10 = 0.1875
        (0.5, 6.0, 3),
        # nothing rejected: K / (K + c) grows with K
        (1.0, 1.0, 16),
        # nothing accepted: 1 / (K + c) falls
        (0.0, 100.0, 1),
    ],
)
def test_worked_numbers(acceptance, intercept, expected):
    assert length_of_next(trained(acceptance, intercept, slope=0.0)) == expected


def test_drafts_are_long_where_they_stand_and_the_expert_is_dear():
    assert length_of_next(trained(0.97, intercept=20.0, slope=0.0)) >= 12
    assert length_of_next(trained(0.3, intercept=1.0, slope=0.0)) == 1
    lengths = [length_of_next(trained(a, 10.0, 0.0)) for a in (0.1, 0.5, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4


def test_an_expert_that_costs_by_the_token_is_asked_often():
    """c + b K with c = 0.2: a longer draft saves only 0.2 and risks b per dropped token."""
    assert length_of_next(trained(0.8, intercept=0.2, slope=5.0)) == 1
    assert length_of_next(trained(0.8, intercept=5.2, slope=0.0)) > 3


def test_the_length_is_the_best_of_all_fixed_ones():
    for acceptance, intercept, slope in itertools.product((0.2, 0.6, 0.9), (0.5, 4.0, 15.0), (0.0, 0.3)):

        def rate(k, a=acceptance, c=intercept, b=slope):
            return (1 - a**k) / (1 - a) / (k + c + b * k)

        best = max(rate(k) for k in range(1, 17))
        assert rate(length_of_next(trained(acceptance, intercept, slope))) == pytest.approx(best, rel=1e-3)


def test_drafts_that_cannot_fall_are_no_reason_to_stop():
    """The expert is never asked before its answer matters."""
    lookahead = trained(0.1, intercept=0.5, slope=0.0)
    assert length_of_next(lookahead) == 1
    assert all(lookahead.goes_on(length, reach=1.0) for length in range(1, 16))
    assert not lookahead.goes_on(16, reach=1.0)


@pytest.mark.parametrize(("intercept", "slope"), [(3.0, 0.5), (0.0, 2.0), (10.0, 0.0)])
def test_the_slope_of_the_costs_is_found(intercept, slope):
    lookahead = trained(0.7, intercept, slope, rounds=3)
    assert lookahead.slope == pytest.approx(slope, abs=1e-9)


def test_no_slope_is_negative():
    lookahead = Lookahead()
    for length, cost in zip(FIRST_LENGTHS, (5.0, 9.0, 1.0), strict=True):  # more tokens that happened to be faster
        observe(lookahead, length, 0.5, cost, 0.0)
    assert lookahead.slope == 0


@pytest.mark.parametrize("max_length", [1, 3, 16])
def test_the_first_lengths_and_the_limit(max_length):
    lookahead = Lookahead(max_length)
    lengths = []
    for _ in range(10):
        lengths.append(length_of_next(lookahead))
        observe(lookahead, lengths[-1], 1.0, 50.0, 0.0)
    assert lengths[:3] == [min(length, max_length) for length in FIRST_LENGTHS]
    assert set(lengths[3:]) == {max_length} or max_length == 16
    assert lengths[-1] == max_length


def test_old_rounds_are_forgotten():
    lookahead = trained(1.0, intercept=10.0, slope=0.0)
    assert length_of_next(lookahead) == 16
    for _ in range(100):
        observe(lookahead, length_of_next(lookahead), 0.1, 10.0, 0.0)
    assert length_of_next(lookahead) < 4


# What the sampler tells it, and what it makes of the answer.


@pytest.fixture
def told(monkeypatch):
    """What every `observe` was told."""
    told, observe = [], Lookahead.observe

    def note(self, length, tokens, **others):
        told.append({"length": length, "tokens": tokens, **others})
        observe(self, length, tokens, **others)

    monkeypatch.setattr(Lookahead, "observe", note)
    return told


def opposites() -> list:
    """A policy that draws 2 or 3, and an expert that draws 4 or 5."""
    models = [tiny_model(seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        for model, (first, second) in zip(models, ([2, 3], [4, 5]), strict=True):
            model.lm_head.weight[[token for token in range(7) if token not in (first, second)]] = 0
            model.lm_head.weight[second] = -model.lm_head.weight[first]
            model.lm_head.weight *= 1000
    return models


def test_a_fixed_draft_length_needs_no_measurement(told):
    Guidance(threshold=1.2).sample(3, tiny_model(1), tiny_model(2), PROMPTS, length=12)
    assert told == []


def test_every_round_is_measured(told, monkeypatch):
    """By a clock that ticks 10 seconds per policy forward and 1 per expert forward."""
    models = tiny_model(1), tiny_model(2)
    seconds = [0]
    for model, cost in zip(models, (10, 1), strict=True):
        model.register_forward_hook(lambda *_, cost=cost: seconds.__setitem__(0, seconds[0] + cost))
    monkeypatch.setattr(speculative.time, "perf_counter", lambda: seconds[0])
    rollout = Guidance("constant", max_weight=0.0).sample(None, *models, PROMPTS, length=12)
    # Nothing is at stake: each of 3 rows drafts 4, then 2, and of the next 8 the 6 that are left.
    assert told == [
        {
            "length": length,
            "tokens": length,
            "num_at_stake": 0,
            "num_rejected": 0,
            "policy_seconds": 10 * length,
            "rest_seconds": 1,
        }
        for length in (4, 2, 6)
    ]
    assert rollout.num_drafted == 36


def test_only_drafts_that_were_come_to_count(told):
    rollout = Guidance("constant", max_weight=0.8).sample(None, tiny_model(1), tiny_model(2), [PROMPTS[0]], length=400)
    # A single row without ends: every draft that was judged became a token, the rejected one by replacement.
    assert sum(entry["tokens"] for entry in told) == rollout.num_tokens == 400
    assert {entry["num_rejected"] for entry in told} == {0, 1}
    assert sum(entry["num_rejected"] for entry in told) == sum(rollout.expert_drawn[0])
    assert all(entry["num_rejected"] <= entry["num_at_stake"] <= entry["tokens"] for entry in told)
    # at stake: 1 - w <= u, a share of w
    assert sum(entry["num_at_stake"] for entry in told) == pytest.approx(0.8 * 400, abs=4 * (400 * 0.8 * 0.2) ** 0.5)


def test_the_risk_of_a_draft_at_stake_is_the_total_variation():
    """P(rejected | at stake) = w TV / w."""
    policy, expert = opposites()
    sampler = Guidance("constant", max_weight=0.3).sampler(None, policy, expert)
    call = {"entropy_threshold": 1.0, "max_completion_length": 40, "eos_token_ids": ()}
    sampler.sample(PROMPTS, **call)
    assert sampler.lookahead.risk > 0.9
    # What falls for sure ends the round of a single row at once, so that no draft is dropped.
    rollout = sampler.sample(PROMPTS[:1], **call)
    assert 0 < sum(rollout.expert_drawn[0]) < 40
    assert rollout.num_drafted == rollout.num_tokens == 40
    sampler = Guidance("constant", max_weight=0.3).sampler(None, policy, policy)
    sampler.sample(PROMPTS, **call)
    assert sampler.lookahead.risk < 0.1


def test_a_round_ends_where_all_rows_do(monkeypatch):
    """Drafts behind an end are worth nothing: with ends everywhere a round has a single draft."""
    sampler = Guidance("constant", max_weight=0.0).sampler(None, tiny_model(1), tiny_model(2))
    call = {"entropy_threshold": 1.0, "max_completion_length": 12}
    sampler.sample(PROMPTS * 4, eos_token_ids=(), **call)
    assert sampler.sample(PROMPTS, eos_token_ids=range(7), **call).num_drafted == len(PROMPTS)
