"""Weights that turn expectations under pi_mix into expectations under pi_theta, checked by summing over all tokens and sequences."""

import math

import pytest
import torch

from trl_selective.functional import (
    effective_sample_size,
    guided_importance_weight,
    injected_importance_weight,
    masked_importance_weight,
    mixed_policy,
    policy_shaping_weight,
    sequence_importance_weight,
    truncated_importance_weight,
)

VOCAB = 5


def random_laws(*batch: int, sharpness: float = 2.0) -> torch.Tensor:
    return (sharpness * torch.randn(*batch, VOCAB, dtype=torch.float64)).softmax(-1)


def logs(*ratios: float) -> torch.Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log()


def test_truncated_and_masked_worked_numbers():
    log_ratio = logs(0.5, 2.0, 3.0)
    torch.testing.assert_close(truncated_importance_weight(log_ratio), log_ratio.exp())
    torch.testing.assert_close(truncated_importance_weight(log_ratio, 2.5).tolist(), [0.5, 2.0, 2.5])
    torch.testing.assert_close(masked_importance_weight(log_ratio, 2.5).tolist(), [0.5, 2.0, 0.0])
    torch.testing.assert_close(masked_importance_weight(log_ratio), log_ratio.exp())
    assert masked_importance_weight(torch.zeros(1), 1.0).tolist() == [1.0]  # "at most": the level itself stays


def test_sequence_worked_numbers():
    log_ratio = torch.stack([logs(0.5, 4.0, 9.0), logs(0.5, 0.5, 0.5), logs(7.0, 7.0, 7.0)])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    # 0.5 * 4 = 2 (the third is masked); 0.5^3 = 0.125; an empty product
    expected = torch.tensor([[2.0], [0.125], [1.0]], dtype=torch.float64)
    torch.testing.assert_close(sequence_importance_weight(log_ratio, mask), expected)
    expected[0] = 1.5
    torch.testing.assert_close(sequence_importance_weight(log_ratio, mask.bool(), 1.5), expected)
    expected[0] = 0.0
    torch.testing.assert_close(sequence_importance_weight(log_ratio, mask, 1.5, drop=True), expected)


def test_what_lies_behind_the_mask_never_counts():
    log_ratio = torch.tensor([[0.5, torch.nan, torch.inf]])
    mask = torch.tensor([[True, False, False]])
    assert sequence_importance_weight(log_ratio, mask).item() == pytest.approx(math.exp(0.5))
    for correction in ("token_truncate", "token_mask"):
        weights = guided_importance_weight(log_ratio, mask, correction)
        assert weights.tolist() == [[pytest.approx(math.exp(0.5)), 1.0, 1.0]]
    for correction in ("sequence_truncate", "sequence_mask"):
        weights = guided_importance_weight(log_ratio, mask, correction)
        assert weights.tolist() == [[pytest.approx(math.exp(0.5))]]


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        # rows have ratios 0.5, 4 (product 2) and 4, 4 (product 16); the last position, and the last row, are not guided
        ("token_truncate", [[0.5, 3.0, 1.0], [3.0, 3.0, 1.0], [1.0, 1.0, 1.0]]),
        ("token_mask", [[0.5, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
        ("sequence_truncate", [[2.0], [3.0], [1.0]]),
        ("sequence_mask", [[2.0], [0.0], [1.0]]),
    ],
)
def test_each_correction_in_numbers(correction, expected):
    log_ratio = torch.stack([logs(0.5, 4.0, 8.0), logs(4.0, 4.0, 8.0), logs(9.0, 9.0, 9.0)])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    weights = guided_importance_weight(log_ratio, mask, correction, 3.0)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_a_row_that_is_not_guided_has_the_weight_1_whatever_the_level(correction):
    weights = guided_importance_weight(torch.zeros(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), correction, 0.5)
    assert (weights[0] == (0.5 if correction.endswith("truncate") else 0.0)).all()
    assert (weights[1] == 1).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.95])
def test_the_token_ratio_is_unbiased(weight):
    """E_mix[pi/mix f] = E_pi[f], for every f: summed over the vocabulary."""
    policy, expert = random_laws(30), random_laws(30)
    mixed = mixed_policy(policy, expert, torch.full((30,), weight, dtype=torch.float64))
    value = torch.randn(30, VOCAB, dtype=torch.float64)
    ratio = truncated_importance_weight(policy.log() - mixed.log())
    torch.testing.assert_close((mixed * ratio * value).sum(-1), (policy * value).sum(-1), rtol=0, atol=1e-12)


def test_the_sequence_ratio_is_unbiased_for_a_reward_of_the_whole():
    """Two tokens, the second law depends on the first token: E_mix[prod pi/mix R] = E_pi[R], summed over all pairs."""
    laws = []
    for _ in range(2):  # policy, expert
        first, second = random_laws(), random_laws(VOCAB)
        laws.append((first, second))
    (policy_1, policy_2), (expert_1, expert_2) = laws
    mixed_1 = mixed_policy(policy_1, expert_1, torch.tensor(0.6, dtype=torch.float64))
    mixed_2 = mixed_policy(policy_2, expert_2, torch.rand(VOCAB, dtype=torch.float64))

    pairs = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    a, b = pairs.T
    policy, mixed = policy_1[a] * policy_2[a, b], mixed_1[a] * mixed_2[a, b]
    log_ratio = torch.stack([(policy_1 / mixed_1)[a].log(), (policy_2 / mixed_2)[a, b].log()], dim=1)
    reward = torch.randn(len(pairs), dtype=torch.float64)
    weights = sequence_importance_weight(log_ratio, torch.ones_like(log_ratio).bool()).squeeze(1)
    torch.testing.assert_close((mixed * weights * reward).sum(), (policy * reward).sum(), rtol=0, atol=1e-12)

    # A token's own ratio does not correct for the tokens before it, and truncation lowers what it cuts.
    assert ((mixed * log_ratio[:, 1].exp() * reward).sum() - (policy * reward).sum()).abs() > 1e-3
    cut = sequence_importance_weight(log_ratio, torch.ones_like(log_ratio).bool(), 1.0).squeeze(1)
    assert (mixed * cut).sum() < 1 - 1e-3


@pytest.mark.parametrize("max_weight", [0.1, 0.5, 0.9])
def test_a_cap_on_w_bounds_the_ratio(max_weight):
    policy, expert = random_laws(200, sharpness=8.0), random_laws(200, sharpness=8.0)
    weight = max_weight * torch.rand(200, dtype=torch.float64)
    weight[:50] = max_weight
    ratio = policy / mixed_policy(policy, expert, weight)
    assert ratio.max() <= 1 / (1 - max_weight) * (1 + 1e-12)
    assert ratio.max() > 0.99 / (1 - max_weight)  # the bound is reached where the expert gives nothing


@pytest.mark.parametrize("gamma", [0.01, 0.1, 1.0])
def test_policy_shaping_is_the_gradient_of_x_over_x_plus_gamma(gamma):
    log_probs = torch.linspace(-20, 0, 101, dtype=torch.float64, requires_grad=True)
    probs = log_probs.exp()
    (gradient,) = torch.autograd.grad((probs / (probs + gamma)).sum(), log_probs)
    torch.testing.assert_close(policy_shaping_weight(log_probs.detach(), gamma), gradient)


def test_policy_shaping_peaks_where_pi_is_gamma():
    # 0.1 * 0.1 / 0.2^2 = 1/4; 0.1 * 1 / 1.1^2 = 0.0826
    assert policy_shaping_weight(logs(0.1)).item() == pytest.approx(0.25)
    assert policy_shaping_weight(logs(1.0)).item() == pytest.approx(0.1 / 1.21)
    assert (policy_shaping_weight(torch.linspace(-30, 0, 1000, dtype=torch.float64)) <= 0.25 + 1e-12).all()
    assert policy_shaping_weight(torch.tensor(-50.0)).item() < 1e-20


def test_effective_sample_size():
    assert effective_sample_size(torch.full((7,), 3.0)).item() == pytest.approx(1)
    assert effective_sample_size(torch.eye(5)[2]).item() == pytest.approx(1 / 5)
    # (3 + 1)^2 / (2 * (9 + 1)) = 16 / 20
    assert effective_sample_size(torch.tensor([3.0, 1.0])).item() == pytest.approx(0.8)
    assert effective_sample_size(torch.tensor([[3.0], [1.0]])).item() == pytest.approx(0.8)
    assert effective_sample_size(torch.zeros(3)).isnan()
    assert effective_sample_size(torch.zeros(0)).isnan()


# ---- Injected completions --------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
INJECTED = MASK.any(1)
GAMMA = 0.1


def shaped(probs: torch.Tensor) -> torch.Tensor:
    return probs / (probs + GAMMA)


def written_objective(correction: str, log_probs, behaviour, max_ratio: float) -> torch.Tensor:
    """The table of `injected_importance_weight` for one completion with A = 1. No mask: only its own tokens are given."""
    if correction == "policy_shaping":
        return shaped(log_probs.exp()).sum()
    if correction == "sequence_policy_shaping":
        return len(log_probs) * shaped(log_probs.mean().exp())
    if correction == "none":
        return log_probs.sum()
    ratio = (log_probs.exp() / behaviour.exp()).detach()
    ratio = ratio if correction == "truncated" else ratio.prod()
    return (ratio.clamp(max=max_ratio) * log_probs).sum()


@pytest.mark.parametrize(
    ("correction", "max_ratio"),
    [
        ("policy_shaping", 1.0),
        ("sequence_policy_shaping", 1.0),
        *((name, bound) for name in ("truncated", "sequence_truncated") for bound in (0.8, 2.0, math.inf)),
        ("none", 1.0),
    ],
)
def test_injected_weights_give_the_gradient_of_the_written_objective(correction, max_ratio):
    """With respect to the logits behind log pi: the weight times the gradient of log pi, for all tokens and completions."""
    logits = torch.randn(4, 5, VOCAB, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(VOCAB, (4, 5, 1))
    behaviour = random_laws(4, 5).gather(-1, tokens).squeeze(-1).log()
    log_probs = logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)
    objective = sum(
        written_objective(correction, log_probs[row][MASK[row].bool()], behaviour[row][MASK[row].bool()], max_ratio)
        for row in range(3)
    )
    (expected,) = torch.autograd.grad(objective, logits, retain_graph=True)

    weights = injected_importance_weight(
        log_probs.detach(), behaviour, MASK, correction, gamma=GAMMA, max_ratio=max_ratio
    )
    (gradient,) = torch.autograd.grad((weights * log_probs * MASK).sum(), logits)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    if "truncated" in correction and math.isfinite(max_ratio):  # the bound is met by some and not by others
        injected = weights.expand_as(MASK)[MASK.bool()]
        assert (injected == max_ratio).any()
        assert (injected < max_ratio).any()


@pytest.mark.parametrize(
    ("correction", "max_ratio", "expected"),
    [
        # A completion of two tokens with pi = 0.1, 0.4 and pi_b = 0.2, 0.1, a row that is not injected, and one token with pi = pi_b = 0.9.
        # 0.1 * 0.1 / 0.2^2 = 0.25, 0.1 * 0.4 / 0.5^2 = 0.16; 0.1 * 0.9 / 1^2 = 0.09
        ("policy_shaping", 1.0, [[0.25, 0.16, 1.0], [1.0, 1.0, 1.0], [0.09, 1.0, 1.0]]),
        # the geometric mean of 0.1 and 0.4 is 0.2: 0.1 * 0.2 / 0.3^2 = 2/9
        ("sequence_policy_shaping", 1.0, [[2 / 9], [1.0], [0.09]]),
        # 0.1 / 0.2 = 0.5, 0.4 / 0.1 = 4; their product is 2
        ("truncated", math.inf, [[0.5, 4.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
        ("truncated", 3.0, [[0.5, 3.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
        ("truncated", 0.4, [[0.4, 0.4, 1.0], [1.0, 1.0, 1.0], [0.4, 1.0, 1.0]]),
        ("sequence_truncated", math.inf, [[2.0], [1.0], [1.0]]),
        ("sequence_truncated", 1.5, [[1.5], [1.0], [1.0]]),
        ("sequence_truncated", 0.4, [[0.4], [1.0], [0.4]]),
        ("none", 1.0, [[1.0], [1.0], [1.0]]),
    ],
)
def test_injected_weights_in_numbers(correction, max_ratio, expected):
    log_probs = torch.stack([logs(0.1, 0.4, 0.3), logs(0.5, 0.5, 0.5), logs(0.9, 0.2, 0.2)])
    behaviour = torch.stack([logs(0.2, 0.1, 0.9), logs(0.1, 0.1, 0.1), logs(0.9, 0.1, 0.1)])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    weights = injected_importance_weight(log_probs, behaviour, mask.bool(), correction, max_ratio=max_ratio)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.01, 0.5])
def test_gamma_is_where_an_injected_token_weighs_most(gamma):
    log_probs = torch.linspace(-9, 0, 1001, dtype=torch.float64).unsqueeze(0)
    weights = injected_importance_weight(
        log_probs, None, torch.ones_like(log_probs).bool(), "policy_shaping", gamma=gamma
    )
    assert log_probs[0, weights.argmax()].exp().item() == pytest.approx(gamma, rel=0.01)
    mean = injected_importance_weight(
        logs(gamma / 2, gamma * 2).unsqueeze(0), None, torch.ones(1, 2).bool(), "sequence_policy_shaping", gamma=gamma
    )
    assert mean.item() == pytest.approx(0.25)  # the geometric mean is gamma


@pytest.mark.parametrize(
    "correction", ["policy_shaping", "sequence_policy_shaping", "truncated", "sequence_truncated"]
)
def test_what_is_not_injected_has_the_weight_1_whatever_stands_there(correction):
    log_probs, behaviour = random_laws(4)[:, :5].log(), random_laws(4)[:, :5].log()
    weights = injected_importance_weight(log_probs, behaviour, MASK, correction, max_ratio=0.5)
    garbage = torch.where(MASK.bool(), 0.0, torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, -1e30]))
    spoilt = injected_importance_weight(log_probs + garbage, behaviour - garbage, MASK, correction, max_ratio=0.5)
    assert torch.equal(spoilt, weights)
    assert (weights[~INJECTED] == 1).all()
    if weights.size(1) > 1:
        assert (weights[~MASK.bool()] == 1).all()
    assert (weights[INJECTED].expand(3, 5)[MASK[INJECTED].bool()] < 1).all()


@pytest.mark.parametrize("correction", ["truncated", "sequence_truncated"])
def test_a_ratio_needs_the_experts_log_probabilities(correction):
    with pytest.raises(AssertionError, match=f"{correction} needs log-probabilities of the behaviour policy"):
        injected_importance_weight(torch.zeros(1, 2), None, torch.ones(1, 2).bool(), correction)
