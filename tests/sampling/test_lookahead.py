"""Draft far where drafts stand and the expert is dear, and not where they fall."""

import itertools

import numpy as np
import pytest

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance
from trl_selective.sampling import speculative
from trl_selective.sampling.lookahead import FIRST_LENGTHS, PLAN, Lookahead

NO_END = 10**12  # tokens left: rows do not wait for each other


def trained(acceptance: float, intercept: float, slope: float, max_length: int = 16, rounds: int = 100) -> Lookahead:
    """After rounds in which a draft fell with 1 - `acceptance`, and the expert cost `intercept + slope K` policy forwards."""
    lookahead = Lookahead(max_length)
    for _ in range(rounds):
        observe(lookahead, lookahead.next_length(NO_END), acceptance, intercept, slope)
    return lookahead


def observe(lookahead: Lookahead, length: int, acceptance: float, intercept: float, slope: float) -> None:
    """A round as it is on average. The drafts that were come to are 1 + a + ... + a^(K-1)."""
    judged = sum(acceptance**k for k in range(length))
    lookahead.observe(
        length,
        num_tested=round(1000 * judged),
        num_rejected=round(1000 * judged * (1 - acceptance)),
        seconds=0.01
        * (length + intercept + slope * length),  # 0.01 seconds a policy forward: only the ratio may count
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
    assert trained(acceptance, intercept, slope=0.0).best_length(NO_END) == expected


def test_drafts_are_long_where_they_stand_and_the_expert_is_dear():
    assert trained(0.97, intercept=20.0, slope=0.0).next_length(NO_END) >= 12
    assert trained(0.3, intercept=1.0, slope=0.0).next_length(NO_END) == 1
    lengths = [trained(a, 10.0, 0.0).next_length(NO_END) for a in (0.1, 0.5, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4


def test_an_expert_that_costs_by_the_token_is_asked_often():
    """c + b K with c = 0.2: a longer draft saves only 0.2 and risks b per dropped token."""
    assert trained(0.8, intercept=0.2, slope=5.0).next_length(NO_END) == 1
    assert trained(0.8, intercept=5.2, slope=0.0).next_length(NO_END) > 3


def rate(length: int, acceptance: float, intercept: float, slope: float) -> float:
    """Tokens per policy forward, at worst."""
    return (1 - acceptance**length) / (1 - acceptance) / (length + intercept + slope * length)


def test_the_length_is_the_shortest_of_the_best_fixed_ones():
    for costs in itertools.product((0.2, 0.6, 0.9), (0.5, 4.0, 15.0), (0.0, 0.3)):
        best = max(rate(k, *costs) for k in range(1, 17))
        assert rate(trained(*costs).best_length(NO_END), *costs) == pytest.approx(best, rel=1e-3)


def test_where_rows_wait_for_each_other_drafts_are_shorter():
    """Against rollouts of 16 rows, thrown with dice: a row gets 1 to K tokens from a round, and all wait for the last one."""
    rng, num_tokens = np.random.default_rng(0), 64

    def seconds(length: int, acceptance: float, intercept: float, slope: float) -> float:
        falls = rng.random((400, 16, num_tokens, length)) >= acceptance
        tokens = np.where(falls.any(-1), falls.argmax(-1) + 1, length)
        is_live = tokens.cumsum(-1) - tokens < num_tokens
        # Rows that are left make up two fifths of the cost of a round.
        return (is_live.any(1) * (0.6 + 0.4 * is_live.mean(1))).sum(-1).mean() * (length + intercept + slope * length)

    for costs in ((0.97, 0.6, 0.3), (0.94, 0.6, 0.3), (0.9, 2.0, 0.1)):
        lookahead = trained(*costs)
        found = {k: seconds(k, *costs) for k in range(1, 11)}
        waiting, alone = lookahead.best_length(num_tokens), lookahead.best_length(NO_END)
        assert waiting < alone
        assert found[waiting] < found[alone]
        assert found[waiting] <= 1.015 * min(found.values())


@pytest.mark.parametrize(("intercept", "slope"), [(3.0, 0.5), (0.0, 2.0), (10.0, 0.0)])
def test_the_slope_of_the_costs_is_found(intercept, slope):
    lookahead = trained(0.7, intercept, slope, rounds=3)
    assert lookahead.line() == pytest.approx((0.01 * (1 + slope), 0.01 * intercept), abs=1e-9)


def test_no_time_is_negative():
    lookahead = Lookahead()
    for length, seconds in zip(FIRST_LENGTHS, (5.0, 9.0, 1.0), strict=True):  # more tokens that happened to be faster
        lookahead.observe(length, num_tested=2, num_rejected=1, seconds=seconds)
    assert lookahead.line() == (0, 5)
    lookahead = Lookahead()
    for length in FIRST_LENGTHS:
        lookahead.observe(length, num_tested=2, num_rejected=1, seconds=length - 1.0)
    assert lookahead.line() == (1, 0)


@pytest.mark.parametrize("max_length", [1, 3, 16])
def test_the_first_lengths_and_the_limit(max_length):
    lookahead = Lookahead(max_length)
    lengths = []
    for _ in range(20):
        lengths.append(lookahead.next_length(NO_END))
        observe(lookahead, lengths[-1], 1.0, 50.0, 0.0)
    assert lengths[:3] == [min(length, max_length) for length in FIRST_LENGTHS]
    assert lookahead.best_length(NO_END) == max(lengths) == max_length


def test_a_round_of_each_plan_is_shorter():
    lookahead, lengths = Lookahead(), []
    for _ in range(len(FIRST_LENGTHS) + 3 * PLAN):
        lengths.append(lookahead.next_length(NO_END))
        observe(lookahead, lengths[-1], 0.9, 2.0, 0.0)  # best: 6
    one = [6] * (PLAN - 1)
    assert lengths[len(FIRST_LENGTHS) :] == [*one, 4] * 3


def test_old_rounds_are_forgotten():
    lookahead = trained(1.0, intercept=10.0, slope=0.0)
    assert lookahead.best_length(NO_END) == 16
    for _ in range(100):
        observe(lookahead, lookahead.next_length(NO_END), 0.1, 10.0, 0.0)
    assert lookahead.next_length(NO_END) < 4


def test_other_work_on_the_machine_is_not_taken_for_a_cost():
    """Two rounds in a hundred take twenty times as long."""
    calm, disturbed = (trained(0.9, 1.0, 0.3, rounds=20) for _ in range(2))
    for number in range(1, 200):
        observe(calm, calm.next_length(NO_END), 0.9, 1.0, 0.3)
        delay = 100.0 if number % 50 == 0 else 0.0
        observe(disturbed, disturbed.next_length(NO_END), 0.9, 1.0 + delay, 0.3)
        assert disturbed.line() == pytest.approx(calm.line(), abs=1e-9)


@pytest.mark.parametrize(("before", "after"), [(1.0, 12.0), (12.0, 1.0)])
def test_costs_that_change_for_good_are_followed(before, after):
    lookahead = trained(0.9, before, slope=0.0)
    for _ in range(100):
        observe(lookahead, lookahead.next_length(NO_END), 0.9, after, 0.0)
    best = max(rate(k, 0.9, after, 0.0) for k in range(1, 17))
    assert rate(lookahead.best_length(NO_END), 0.9, after, 0.0) == pytest.approx(best)


# What the sampler tells it, and what it makes of the answer.


@pytest.fixture
def told(monkeypatch):
    """What every `observe` was told."""
    told, observe = [], Lookahead.observe

    def note(self, length, **others):
        told.append({"length": length, **others})
        observe(self, length, **others)

    monkeypatch.setattr(Lookahead, "observe", note)
    return told


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
            "num_tested": 3 * length,
            "num_rejected": 0,
            "seconds": 10 * length + 1,
        }
        for length in (4, 2, 6)
    ]
    assert rollout.num_drafted == 36


def test_only_drafts_that_were_come_to_count(told):
    rollout = Guidance("constant", max_weight=0.8).sample(None, tiny_model(1), tiny_model(2), [PROMPTS[0]], length=400)
    # A single row without ends: every draft that was judged became a token, the rejected one by replacement.
    assert sum(entry["num_tested"] for entry in told) == rollout.num_tokens == 400
    assert {entry["num_rejected"] for entry in told} == {0, 1}
    assert sum(entry["num_rejected"] for entry in told) == sum(rollout.expert_drawn[0])
    assert rollout.num_drafted == sum(entry["length"] for entry in told) > 400


def test_the_survival_of_a_draft_is_what_the_expert_leaves():
    sampler = Guidance("constant", max_weight=0.5).sampler(None, tiny_model(1), tiny_model(2))
    rollout = sampler.sample(PROMPTS * 8, entropy_threshold=1.0, max_completion_length=60, eos_token_ids=())
    share = sum(map(sum, rollout.expert_drawn)) / rollout.num_tokens
    assert 1 - sampler.lookahead(len(PROMPTS * 8)).survival == pytest.approx(share, rel=0.2)
    sampler = Guidance("constant", max_weight=0.5).sampler(None, tiny_model(1), tiny_model(1))
    sampler.sample(PROMPTS * 8, entropy_threshold=1.0, max_completion_length=60, eos_token_ids=())
    assert sampler.lookahead(len(PROMPTS * 8)).survival > 0.99


def test_few_rows_say_nothing_of_many():
    sampler = Guidance("constant", max_weight=0.5).sampler(None, tiny_model(1), tiny_model(2))
    call = {"entropy_threshold": 1.0, "max_completion_length": 60, "eos_token_ids": ()}
    sampler.sample(PROMPTS * 5, **call)  # 15 rows, and fewer at the end
    assert sampler.lookahead(15) is sampler.lookahead(8)
    assert sampler.lookahead(15).rounds > 0 == sampler.lookahead(16).rounds
    sampler.sample(PROMPTS * 6, **call)
    assert sampler.lookahead(16) is sampler.lookahead(31)
    assert sampler.lookahead(18).rounds > 0
