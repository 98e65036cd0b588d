"""How much is each rollout worth? MENTOR (arXiv:2510.04140), Eq. 10-11.

On-policy rollouts compete with one another, as in GRPO. A guided rollout is compared with the on-policy mean of its group and counts only
if it is better: guided rows never move the policy's baseline, and a failed one is ignored, not punished.

A reward of NaN marks a row that no reward function could score (TRL's convention): it is left out of mean and standard deviation, and its
advantage is 0.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

STD_EPSILON = 1e-4  # TRL's: keeps groups without variance at exactly 0


def on_policy_advantages(
    rewards: Float[Tensor, "groups rows"], scale_rewards: Literal["group", "batch", "none"] = "group"
) -> Float[Tensor, "groups rows"]:
    """A = (R - mean_on) / std_on (Eq. 10), as TRL's GRPOTrainer computes it with all rows on-policy.

    Args:
        rewards: total reward of the on-policy rows of each group, NaN where unscorable.
        scale_rewards: whose standard deviation divides: the group's (the paper), the whole batch's, or none's (Dr. GRPO, arXiv:2503.20783).
    """
    advantages = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (nanstd(rewards, dim=1, keepdim=True) + STD_EPSILON)
    elif scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards.flatten(), dim=0) + STD_EPSILON)
    return advantages.nan_to_num(nan=0.0)


def guided_advantages(
    rewards: Float[Tensor, "groups rows"],
    on_policy_rewards: Float[Tensor, "groups on_policy_rows"],
    coef: float,
    reward_range: float | Float[Tensor, "groups #rows"],
) -> Float[Tensor, "groups rows"]:
    """A = alpha max(R - mean_on, 0) / R_range (Eq. 11), in [0, alpha] when rewards span at most `reward_range`.

    Args:
        rewards: total reward of the guided rows of each group, NaN where unscorable.
        on_policy_rewards: total reward of the on-policy rows of the same groups; they alone set the baseline.
        coef: alpha >= 0, annealed to 0 during training.
        reward_range: R_range > 0, the span of the total reward (not of this batch), of all rows, of each group or of each row.
    """
    excess = (rewards - on_policy_rewards.nanmean(dim=1, keepdim=True)).clamp(min=0)
    return (coef / reward_range * excess).nan_to_num(nan=0.0)


def mixed_group_advantages(
    sampled_rewards: Float[Tensor, "groups rows"],
    rewards: Float[Tensor, "groups rows"],
    is_guided: Bool[Tensor, "groups rows"],
    is_injected: Bool[Tensor, "groups rows"],
    coef: float,
    reward_range: float | Float[Tensor, "groups #rows"],
    *,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    injection_advantage: Literal["positive_excess", "group"] = "positive_excess",
) -> Float[Tensor, "groups rows"]:
    """Advantages of groups in which some rows are guided, and some were replaced by expert completions after sampling.

    The baseline is that of all on-policy rollouts as they were sampled, replaced ones included: the rows that stay have the advantage that
    they have without injection. Injected rows count by their positive excess over it, like guided ones (Eq. 11).

    With `injection_advantage="group"`, LUFFY's choice (arXiv:2504.14945), groups with an injected row use Eq. 10 over all that are in the
    group now, guided rows apart; advantages of injected rows are multiplied by alpha.

    Args:
        sampled_rewards: total rewards of the rollouts.
        rewards: the same with those of the injected completions in their places.
        is_guided: which rollouts were guided.
        is_injected: which of all rows were replaced.
        coef: alpha >= 0.
        reward_range: R_range > 0.
        scale_rewards: as for `on_policy_advantages`.
        injection_advantage: "positive_excess" or "group".
    """
    own = sampled_rewards.masked_fill(is_guided, torch.nan)
    advantages = torch.where(
        is_guided | is_injected,
        guided_advantages(rewards, own, coef, reward_range),
        on_policy_advantages(own, scale_rewards),
    )
    if injection_advantage == "group":
        still_guided = is_guided & ~is_injected
        within_group = on_policy_advantages(rewards.masked_fill(still_guided, torch.nan), scale_rewards)
        within_group = torch.where(is_injected, coef * within_group, within_group)
        replaced = is_injected.any(dim=1, keepdim=True) & ~still_guided
        advantages = torch.where(replaced, within_group, advantages)
    return advantages


def total_reward(
    rewards_per_func: Float[Tensor, "rows funcs"], reward_weights: Float[Tensor, "funcs"]
) -> Float[Tensor, "rows"]:
    """Weighted sum over the reward functions that scored a row; NaN if none did.

    Args:
        rewards_per_func: NaN where a function does not apply (it returned None).
        reward_weights: one weight per function.
    """
    total = (rewards_per_func * reward_weights).nansum(dim=1)
    return total.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)


def reward_span(
    rewards_per_func: Float[Tensor, "groups rows funcs"], reward_weights: Float[Tensor, "funcs"]
) -> Float[Tensor, "groups 1"]:
    """Span of the total reward in a group if each function spans [0, 1]: the sum of |weight| over the functions that scored any of its rows.

    Args:
        rewards_per_func: NaN where a function does not apply (it returned None), as with a function per task.
        reward_weights: one weight per function.
    """
    applies = (~rewards_per_func.isnan()).any(dim=1)
    return (applies * reward_weights.abs()).sum(dim=1, keepdim=True)


def is_correct(
    rewards: Float[Tensor, "groups rows"],
    reward_range: float | Float[Tensor, "groups #rows"],
    decision: Float[Tensor, "groups rows"] | None = None,
) -> Bool[Tensor, "groups rows"]:
    """Which rows are right: those to which the deciding function gives more than 0.5; where it gives nothing, and without one, those whose total
    reward exceeds half of its span.

    Args:
        rewards: total rewards, NaN where no function gave one.
        reward_range: their span, of all rows, of each group or of each row.
        decision: what the deciding function gave, whatever its weight, NaN where it does not apply; None for the total reward.
    """
    by_total = rewards > reward_range / 2
    return by_total if decision is None else torch.where(decision.isnan(), by_total, decision > 0.5)


def nanstd(values: Float[Tensor, "..."], dim: int, keepdim: bool = False) -> Float[Tensor, "..."]:
    """Unbiased standard deviation over the entries that are not NaN; NaN where fewer than two are."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squared = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    std = (squared / (count - 1).clamp(min=0)).sqrt()  # 0 / 0 of fewer than two
    return std if keepdim else std.squeeze(dim)
