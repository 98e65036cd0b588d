"""Draft far where drafts are accepted and the expert is dear, and not where they are rejected."""

import itertools

import pytest

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance
from trl_selective.sampling import speculative
from trl_selective.sampling.lookahead import FIRST_LENGTHS, Lookahead


def trained(acceptance: float, intercept: float, slope: float, max_length: int = 16, rounds: int = 60) -> Lookahead:
    """After rounds with this share of accepted drafts, and an expert forward that costs `intercept + slope K` policy forwards."""
    lookahead = Lookahead(max_length)
    for _ in range(rounds):
        length = lookahead.length()
        # A policy forward of 0.01 seconds: only the ratio may count.
        lookahead.observe(length, 1000, round(1000 * acceptance), 0.01 * length, 0.01 * (intercept + slope * length))
    return lookahead


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
    assert trained(acceptance, intercept, slope=0.0).length() == expected


def test_drafts_are_long_where_accepted_and_dear():
    assert trained(0.97, intercept=20.0, slope=0.0).length() >= 12
    assert trained(0.3, intercept=1.0, slope=0.0).length() == 1
    lengths = [trained(a, 10.0, 0.0).length() for a in (0.1, 0.5, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4


def test_an_expert_that_costs_by_the_token_is_asked_often():
    """c + b K with c = 0.2: a longer draft saves only 0.2 and risks b per dropped token."""
    assert trained(0.8, intercept=0.2, slope=5.0).length() == 1
    assert trained(0.8, intercept=5.2, slope=0.0).length() > 3


@pytest.mark.parametrize(("intercept", "slope"), [(3.0, 0.5), (0.0, 2.0), (10.0, 0.0)])
def test_the_line_through_the_costs_is_found(intercept, slope):
    assert trained(0.7, intercept, slope, rounds=3)._expert_cost() == pytest.approx((intercept, slope), abs=1e-9)


def test_no_cost_is_negative():
    lookahead = Lookahead()
    for cost in (5.0, 9.0, 1.0):  # a forward of more tokens that happened to be faster
        length = lookahead.length()
        lookahead.observe(length, 10, 5, length, cost)
    intercept, slope = lookahead._expert_cost()
    assert slope == 0
    assert intercept > 0


@pytest.mark.parametrize("max_length", [1, 3, 16])
def test_the_first_lengths_and_the_limit(max_length):
    lookahead = Lookahead(max_length)
    lengths = []
    for _ in range(10):
        lengths.append(lookahead.length())
        lookahead.observe(lengths[-1], 10, 10, lengths[-1], 50.0)
    assert lengths[:3] == [min(length, max_length) for length in FIRST_LENGTHS]
    assert set(lengths[3:]) == {max_length}


def test_old_rounds_are_forgotten():
    lookahead = trained(1.0, intercept=10.0, slope=0.0)
    assert lookahead.length() == 16
    for _ in range(100):
        length = lookahead.length()
        lookahead.observe(length, 1000, 100, length, 10.0)
    assert lookahead.length() < 4


def test_the_choice_is_the_best_of_all():
    for acceptance, intercept, slope in itertools.product((0.2, 0.6, 0.9), (0.5, 4.0, 15.0), (0.0, 0.3)):

        def rate(k, a=acceptance, c=intercept, b=slope):
            return (1 - a**k) / (1 - a) / (k + c + b * k)

        best = max(range(1, 17), key=rate)
        assert rate(trained(acceptance, intercept, slope).length()) == pytest.approx(rate(best))


# What the sampler tells it.


@pytest.fixture
def told(monkeypatch):
    """The arguments of every `observe`: (length, tested, accepted, policy_seconds, expert_seconds)."""
    told, observe = [], Lookahead.observe

    def note(self, *args):
        told.append(args)
        observe(self, *args)

    monkeypatch.setattr(Lookahead, "observe", note)
    return told


def test_a_fixed_draft_length_needs_no_measurement(told):
    Guidance(threshold=1.2).sample(3, tiny_model(1), tiny_model(2), PROMPTS, length=12)
    assert told == []


def test_all_rounds_but_the_one_that_reads_the_prompts_are_measured(told, monkeypatch):
    """By a clock that ticks 10 seconds per policy forward and 1 per expert forward."""
    models = tiny_model(1), tiny_model(2)
    seconds = [0]
    for model, cost in zip(models, (10, 1), strict=True):
        model.register_forward_hook(lambda *_, cost=cost: seconds.__setitem__(0, seconds[0] + cost))
    monkeypatch.setattr(speculative.time, "perf_counter", lambda: seconds[0])
    rollout = Guidance("constant", max_weight=0.0).sample(None, *models, PROMPTS, length=12)
    # Nothing is rejected, so that each of 3 rows drafts 4, unmeasured; 4 again and 2, in turn; of the next 8 the 2 that are left.
    assert told == [(4, 12, 12, 40, 1), (2, 6, 6, 20, 1), (2, 6, 6, 20, 1)]
    assert rollout.num_drafted == 36


def test_a_draft_counts_as_tested_if_those_before_it_were_accepted(told):
    guidance = Guidance("constant", max_weight=0.8)
    rollout = guidance.sample(None, tiny_model(1), tiny_model(2), [PROMPTS[0]], length=40)
    # A single row without ends: every tested draft is a token, and what was not accepted was redrawn by the expert.
    first = rollout.num_tokens - sum(tested for _, tested, *_ in told)
    assert 1 <= first <= FIRST_LENGTHS[0]
    by_expert = [tested - accepted for _, tested, accepted, *_ in told]
    assert set(by_expert) == {0, 1}
    assert sum(by_expert) == sum(rollout.expert_drawn[0][first:])
    assert all(accepted == length for length, tested, accepted, *_ in told if tested == accepted)
