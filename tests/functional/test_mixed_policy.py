"""Drafting, accepting and replacing gives pi_mix exactly: every token enumerated, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selective.functional import (
    acceptance_probability,
    constant_weight,
    entropy,
    guidance_weight,
    hard_gate,
    mixed_policy,
    residual,
)

VOCAB = 9


def laws(seed: int, sharpness: float, zeros: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random distributions in float64, peaked where `sharpness` is large; each gives `zeros` tokens no probability."""
    logits = sharpness * torch.randn(2, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for row, shift in zip(logits, (0, 2), strict=True):
        row[torch.arange(shift, shift + zeros)] = -torch.inf
    return tuple(logits.softmax(-1))


def drafted_law(policy, expert, weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The law of the token that Algorithm 1 leaves at a position, and the probability that the draft was rejected."""
    accept = torch.stack([acceptance_probability(policy, expert, weight, torch.tensor(y)) for y in range(VOCAB)])
    rejected = (policy * (1 - accept)).sum()
    return policy * accept + rejected * residual(policy, expert), rejected


def assert_law(policy, expert, weight):
    weight = torch.tensor(weight, dtype=torch.float64)
    law, rejected = drafted_law(policy, expert, weight)
    target = (1 - weight) * policy + weight * expert  # Eq. 6
    torch.testing.assert_close(law, target, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed_policy(policy, expert, weight), target, rtol=0, atol=1e-15)
    total_variation = 0.5 * (policy - expert).abs().sum()
    torch.testing.assert_close(rejected, weight * total_variation, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    sharpness=st.floats(0, 60),
    zeros=st.integers(0, 5),
    weight=st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)),
)
def test_accept_or_replace_is_the_mixture(seed, sharpness, zeros, weight):
    assert_law(*laws(seed, sharpness, zeros), weight)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("policy", "expert"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ([1, 0, 0, 0, 0, 0, 0, 0, 0], [1 / 9] * 9),
        ([1 / 9] * 9, [0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0, 0, 0, 0, 0]),
    ],
    ids=["disjoint", "certain_policy", "certain_expert", "identical"],
)
def test_the_law_at_the_edges(policy, expert, weight):
    assert_law(torch.tensor(policy, dtype=torch.float64), torch.tensor(expert, dtype=torch.float64), weight)


def test_the_law_holds_in_a_batch_with_one_weight_each():
    policy, expert = (torch.stack(rows) for rows in zip(*[laws(seed, 3.0) for seed in range(4)], strict=True))
    weight = torch.tensor([0.0, 0.2, 0.9, 1.0], dtype=torch.float64)
    mixed = mixed_policy(policy, expert, weight)
    rest = residual(policy, expert)
    for row in range(4):
        assert torch.equal(mixed[row], mixed_policy(policy[row], expert[row], weight[row]))
        assert torch.equal(rest[row], residual(policy[row], expert[row]))
    assert torch.equal(mixed[0], policy[0])
    assert torch.equal(mixed[3], expert[3])


def test_worked_numbers():
    policy, expert = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    weight = torch.tensor(0.5)
    # 0.5 * 0.5 + 0.5 * 0.25 = 0.375, 0.25, 0.5 * 0.25 + 0.5 * 0.5 = 0.375
    assert mixed_policy(policy, expert, weight).tolist() == [0.375, 0.25, 0.375]
    # 0.375 / 0.5 = 0.75; 0.25 / 0.25 = 1; 0.375 / 0.25 = 1.5, clipped to 1
    accepts = [acceptance_probability(policy, expert, weight, torch.tensor(y)).item() for y in range(3)]
    assert accepts == [0.75, 1.0, 1.0]
    # expert - policy = (-0.25, 0, 0.25): only the last gains
    assert residual(policy, expert).tolist() == [0.0, 0.0, 1.0]


def test_a_draft_is_accepted_with_at_least_1_minus_w():
    for seed in range(20):
        policy, expert = laws(seed, 5.0, zeros=2)
        for y in range(VOCAB):
            assert (
                acceptance_probability(policy, expert, torch.tensor(0.3, dtype=torch.float64), torch.tensor(y))
                >= 0.7 - 1e-15
            )


def test_where_both_agree_nothing_is_rejected_and_the_residual_is_a_law():
    policy, _ = laws(0, 2.0)
    weight = torch.tensor(0.5, dtype=torch.float64)
    assert min(acceptance_probability(policy, policy, weight, torch.tensor(y)) for y in range(VOCAB)) > 1 - 1e-15
    assert torch.equal(residual(policy, policy), policy)


def test_entropy_of_uniform_and_certain_laws():
    for vocab in (2, 8, 1000, 150_000):
        uniform = torch.full((vocab,), 1 / vocab)
        assert entropy(uniform).item() == pytest.approx(math.log(vocab), rel=1e-5)
    certain = torch.nn.functional.one_hot(torch.arange(4), 7).float()
    assert torch.equal(entropy(certain), torch.zeros(4))
    # -(0.5 log 0.5 + 2 * 0.25 log 0.25) = 1.5 log 2
    assert entropy(torch.tensor([0.5, 0.25, 0.25, 0.0])).item() == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("gap", [0.0, 1.0, 5.0, 10.0, 17.0, 30.0, 100.0, 1e4])
def test_entropy_in_float32_is_that_in_float64_for_peaked_laws(gap):
    logits = torch.zeros(1000, dtype=torch.float64)
    logits[3] = gap
    exact, ours = entropy(logits.softmax(-1)), entropy(logits.float().softmax(-1))
    assert ours >= 0
    assert ours.item() == pytest.approx(exact.item(), abs=2e-5)


def test_entropy_is_never_negative():
    """-sum p log p of a law that rounds to more than 1 is -p log p < 0 for p just above 1."""
    assert entropy(torch.tensor([1 + 1e-6, 0.0])).item() == 0


def test_the_ramp():
    entropies = torch.tensor([0.0, 0.5, 1.0, 2.0, 7.0])
    # 0 / 2, 0.5 / 2, 1 / 2, 2 / 2, 7 / 2 clipped
    assert guidance_weight(entropies, 2.0).tolist() == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert guidance_weight(entropies, 2.0, max_weight=0.375).tolist() == [0.0, 0.25, 0.375, 0.375, 0.375]
    assert guidance_weight(entropies, 999.0)[-1].item() == pytest.approx(7 / 999)
    assert guidance_weight(entropies, 2.0, max_weight=0.0).tolist() == [0.0] * 5


@pytest.mark.parametrize("threshold", [0, 0.0, 1e-45, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_threshold_0_only_a_certain_policy_is_left_alone(threshold, dtype):
    assert guidance_weight(torch.tensor([0.0, 1e-8, 3.0], dtype=dtype), threshold).tolist() == [0.0, 1.0, 1.0]


def test_the_gate():
    entropies = torch.tensor([0.0, 1.999, 2.0, 3.0])
    assert hard_gate(entropies, 2.0).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert hard_gate(entropies, 2.0, max_weight=0.25).tolist() == [0.0, 0.0, 0.25, 0.25]
    assert hard_gate(entropies, 0.0).tolist() == [1.0] * 4


def test_the_constant():
    assert constant_weight(torch.tensor([0.0, 5.0]), 2.0, max_weight=0.75).tolist() == [0.75, 0.75]
    assert constant_weight(torch.tensor([0.0, 5.0]), 0.0).tolist() == [1.0, 1.0]
