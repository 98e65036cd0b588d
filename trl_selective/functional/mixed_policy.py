"""From which law is a guided token drawn, and how can it be drawn by drafting? MENTOR (arXiv:2510.04140), Eq. 6-8 and Algorithm 1.

    pi_mix = (1 - w) pi_theta + w pi*          w = min(1, H / gamma_p)

H is the entropy of the policy, gamma_p a threshold that few tokens exceed (`thresholds.py`). Where the policy is certain, H = 0 gives w = 0 and
the mixture is the policy; where it is as uncertain as the top (1 - p) of its tokens, the expert decides alone.

A token drafted from the policy becomes a token of the mixture by accepting it with probability min(1, pi_mix / pi_theta) and by redrawing a
rejected one from (pi_mix - pi_theta)+, normalised: q(y) a(y) + P(reject) r(y) = pi_mix(y) for every y.

All distributions are probabilities *after* temperature, over one common vocabulary, in float32 or better.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_probs(logits: Float[Tensor, "*batch vocab"], temperature: float) -> Float[Tensor, "*batch vocab"]:
    """Probabilities after temperature, in float32. Normalised in float64: over 150,000 ids a sum in float32 may be off by some 1e-4."""
    probs = (logits.float() / temperature).softmax(-1)
    return probs / probs.sum(-1, keepdim=True, dtype=torch.float64).float()


def probability_of(token_ids: Int[Tensor, "*batch"], probs: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """The probabilities of these tokens."""
    return probs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def finite_log(probs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The logarithm; of 0, that of the smallest normal number: about -87 in float32."""
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()


def entropy(probs: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """Entropy in nats, H = -sum_y p(y) log p(y), with 0 log 0 = 0."""
    return torch.xlogy(probs, probs).sum(-1).clamp(max=0).neg()  # rounding may lift the sum of a certain law above 0


def guidance_weight(
    entropy: Float[Tensor, "*batch"], threshold: float, max_weight: float = 1.0
) -> Float[Tensor, "*batch"]:
    """The paper's weight, w = min(1, H / gamma_p), capped at `max_weight`.

    Args:
        entropy: entropy H of the policy, nats.
        threshold: gamma_p >= 0, nats. At 0 every token that is not certain gets the full weight; a certain one (H = 0) never gets any.
        max_weight: in [0, 1]. Below 1 (ours) it bounds the importance ratio, pi_theta / pi_mix <= 1 / (1 - max_weight); 1 is the paper.
    """
    return (entropy / max(threshold, torch.finfo(entropy.dtype).tiny)).clamp(max=max_weight)


def hard_gate(entropy: Float[Tensor, "*batch"], threshold: float, max_weight: float = 1.0) -> Float[Tensor, "*batch"]:
    """All or nothing: w = `max_weight` where H >= gamma_p, else 0. Ours, as an ablation of the paper's ramp."""
    return max_weight * (entropy >= threshold).to(entropy.dtype)


def constant_weight(
    entropy: Float[Tensor, "*batch"], threshold: float, max_weight: float = 1.0
) -> Float[Tensor, "*batch"]:
    """The same weight everywhere, w = `max_weight`: guidance without selection. Entropy and threshold have no say."""
    return torch.full_like(entropy, max_weight)


Weighting = Callable[[Float[Tensor, "*batch"], float, float], Float[Tensor, "*batch"]]
WEIGHTINGS: dict[str, Weighting] = {
    "entropy": guidance_weight,
    "hard_gate": hard_gate,
    "constant": constant_weight,
}


def mixed_policy(
    policy_probs: Float[Tensor, "*batch vocab"],
    expert_probs: Float[Tensor, "*batch vocab"],
    weight: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch vocab"]:
    """The law of a guided token, pi_mix = (1 - w) pi_theta + w pi* (Eq. 6). w = 0 is the policy and w = 1 the expert, exactly."""
    weight = weight.unsqueeze(-1)
    return (1 - weight) * policy_probs + weight * expert_probs


def acceptance_probability(
    policy_probs: Float[Tensor, "*batch vocab"],
    expert_probs: Float[Tensor, "*batch vocab"],
    weight: Float[Tensor, "*batch"],
    token_ids: Int[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Probability to keep a token drafted from the policy, min(1, pi_mix(y) / pi_theta(y)) (Eq. 7).

    It is at least 1 - w whatever the expert says, and it is 1 for a token that the policy cannot draw (probability 0).
    """
    return acceptance(probability_of(token_ids, policy_probs), probability_of(token_ids, expert_probs), weight)


def acceptance(
    policy_prob: Float[Tensor, "*batch"], expert_prob: Float[Tensor, "*batch"], weight: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """`acceptance_probability` of a token from its probability under either model."""
    mixed = (1 - weight) * policy_prob + weight * expert_prob
    return torch.where(policy_prob > 0, (mixed / policy_prob).clamp(max=1), 1.0)


def residual(
    policy_probs: Float[Tensor, "*batch vocab"], expert_probs: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch vocab"]:
    """The law of the token that replaces a rejected draft, (pi_mix - pi_theta)+ / sum (Eq. 8).

    pi_mix - pi_theta = w (pi* - pi_theta), so w cancels and is no argument. Where policy and expert agree nothing is ever rejected, and the
    expert's distribution stands in for the 0/0.
    """
    excess = (expert_probs - policy_probs).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, expert_probs)
