"""What does a token count that the policy did not draw? Importance weights for guided tokens.

A guided token is drawn from pi_mix (arXiv:2510.04140, Eq. 6), but GRPO's gradient is an expectation under pi_theta_old. The weight
pi_theta_old / pi_mix corrects for it, per token or as a product over the sequence; truncation or masking buys variance with bias.
The paper itself applies no weight. With the guidance weight capped at w_max < 1 (ours), pi_mix >= (1 - w_max) pi_theta_old, so that the
token ratio never exceeds 1 / (1 - w_max): corrected without any truncation.

A token of an injected completion was drawn by somebody else altogether, with a probability pi_b that is often unknown. It is weighed by
the *current* policy, afresh in each iteration: see `injected_importance_weight`.

Weights are factors on advantages: call them on detached log-probabilities. Positions where `mask` is 0 get the weight 1 and never count.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mask = Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"]
TRUNCATED = (
    "truncated",
    "sequence_truncated",
)  # corrections of injected rows that need the expert's log-probabilities


def truncated_importance_weight(
    log_ratio: Float[Tensor, "*shape"], max_ratio: float = float("inf")
) -> Float[Tensor, "*shape"]:
    """min(ratio, max_ratio): large ratios count less than they should (arXiv:1802.01561, the rho-bar of V-trace).

    Args:
        log_ratio: log pi_theta_old - log pi_mix, of tokens or of sequences.
        max_ratio: > 0; infinity is the plain importance weight.
    """
    return log_ratio.exp().clamp(max=max_ratio)


def masked_importance_weight(
    log_ratio: Float[Tensor, "*shape"], max_ratio: float = float("inf")
) -> Float[Tensor, "*shape"]:
    """The ratio where it is at most `max_ratio`, else 0: what lies too far off is left out."""
    ratio = log_ratio.exp()
    return torch.where(ratio <= max_ratio, ratio, 0.0)


def sequence_log_ratio(log_ratio: Float[Tensor, "batch seq"], mask: Mask) -> Float[Tensor, "batch 1"]:
    """Log of the product of the token ratios over the tokens that `mask` selects: 0 for an empty row."""
    return torch.where(mask.bool(), log_ratio, 0.0).sum(-1, keepdim=True)


def sequence_importance_weight(
    log_ratio: Float[Tensor, "batch seq"],
    mask: Mask,
    max_ratio: float = float("inf"),
    *,
    drop: bool = False,
) -> Float[Tensor, "batch 1"]:
    """One weight per sequence, the product of its token ratios: unbiased for the reward of a whole completion, and of high variance.

    Args:
        log_ratio: log pi_theta_old - log pi_mix of each token.
        mask: which tokens belong to the completion.
        max_ratio: truncation level, or the level above which a sequence is dropped.
        drop: give sequences above `max_ratio` the weight 0 instead of `max_ratio`.
    """
    weight = masked_importance_weight if drop else truncated_importance_weight
    return weight(sequence_log_ratio(log_ratio, mask), max_ratio)


def policy_shaping_weight(logps: Float[Tensor, "*shape"], gamma: float = 0.1) -> Float[Tensor, "*shape"]:
    """Gradient weight of LUFFY's policy shaping (arXiv:2504.14945): f(pi) = pi / (pi + gamma) gives pi f'(pi) = gamma pi / (pi + gamma)^2.

    It multiplies the gradient of log pi. It peaks at 1/4 where pi = gamma and vanishes at both ends: likely tokens are left alone, and so are
    hopeless ones.

    Args:
        logps: log pi_theta of the token under the *current* policy.
        gamma: > 0, a probability.
    """
    probs = logps.exp()
    return gamma * probs / (probs + gamma).square()


def injected_importance_weight(
    logps: Float[Tensor, "batch seq"],
    behaviour_logps: Float[Tensor, "batch seq"] | None,
    mask: Mask,
    correction: str,
    *,
    gamma: float = 0.1,
    max_ratio: float = float("inf"),
) -> Float[Tensor, "batch #seq"]:
    """The factor on the gradient A grad log pi_theta of injected completions, under the correction called `correction`.

    | correction | objective of a completion of T tokens | weight of each token |
    |---|---|---|
    | `"policy_shaping"` (arXiv:2504.14945) | A sum_t f(pi_t), f(x) = x / (x + gamma) | gamma pi_t / (pi_t + gamma)^2 |
    | `"sequence_policy_shaping"` | A T f(pi), pi the geometric mean of pi_t | gamma pi / (pi + gamma)^2 |
    | `"truncated"` | A sum_t sg[min(pi_t / pi_b,t, max_ratio)] log pi_t | min(pi_t / pi_b,t, max_ratio) |
    | `"sequence_truncated"` | the same with the product of all ratios | min(prod_t pi_t / pi_b,t, max_ratio) |
    | `"none"` | A sum_t log pi_t: advantage-weighted imitation | 1 |

    Policy shaping takes pi_b as 1, as LUFFY does, and needs no log-probabilities of the expert.

    Args:
        logps: log pi_theta of each token under the *current* policy, detached.
        behaviour_logps: log pi_b of each token; None where the correction does without.
        mask: tokens of injected completions; all others, and rows without any, get the weight 1.
        gamma: of policy shaping, > 0, a probability.
        max_ratio: where a ratio is truncated.
    """
    if correction == "none":
        return torch.ones_like(logps[:, :1])
    if correction == "policy_shaping":
        return torch.where(mask.bool(), policy_shaping_weight(logps, gamma), 1.0)
    if correction == "sequence_policy_shaping":
        mean = sequence_log_ratio(logps, mask) / mask.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(mask.bool().any(-1, keepdim=True), policy_shaping_weight(mean, gamma), 1.0)
    assert behaviour_logps is not None, f"{correction} needs log-probabilities of the behaviour policy"
    level = "sequence" if correction == "sequence_truncated" else "token"
    return guided_importance_weight(logps - behaviour_logps, mask, f"{level}_truncate", max_ratio)


def effective_sample_size(weights: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Kish's effective share of the sample, (sum w)^2 / (n sum w^2), in (0, 1]: 1 for equal weights, 1/n if a single one counts.

    NaN for an empty tensor or if every weight is 0.
    """
    return weights.sum().square() / (weights.numel() * weights.square().sum())


def guided_importance_weight(
    log_ratio: Float[Tensor, "batch seq"], mask: Mask, correction: str, max_ratio: float = float("inf")
) -> Float[Tensor, "batch #seq"]:
    """The weights under the correction called `correction`: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask".

    One per token, or one per completion for the sequence forms.

    Args:
        log_ratio: log pi_theta_old - log pi_mix of each token.
        mask: tokens of guided completions; all others, and completions without any, get the weight 1.
        max_ratio: where the ratio of a token or of a sequence is truncated or masked.
    """
    level, _, bound = correction.partition("_")
    if level == "sequence":
        per_sequence = sequence_importance_weight(log_ratio, mask, max_ratio, drop=bound == "mask")
        return torch.where(mask.bool().any(-1, keepdim=True), per_sequence, 1.0)
    weight = masked_importance_weight if bound == "mask" else truncated_importance_weight
    return torch.where(mask.bool(), weight(log_ratio, max_ratio), 1.0)
