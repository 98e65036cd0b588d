"""The numbers of a guided batch: TRL's own metrics restricted to the policy's rollouts, and what guidance did.

All inputs are global (gathered) tensors with groups contiguous and the guided rows last in each group, so that every process computes the
same numbers.
"""

import math
from collections import Counter

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trl_selective.functional.advantages import nanstd
from trl_selective.injection import Injection
from trl_selective.reward_scale import BatchRewards
from trl_selective.rollout import GuidedRollout


def policy_metrics(
    rewards_per_func: Float[Tensor, "rows funcs"],
    rewards: Float[Tensor, "groups on_policy_rows"],
    reward_func_names: list[str],
    lengths: Int[Tensor, "rows"],
    is_truncated: Bool[Tensor, "rows"],
    scale_rewards: str,
) -> dict[str, float]:
    """TRL's reward and completion-length metrics, under TRL's names, over on-policy rows only: curves that compare with plain GRPO.

    Args:
        rewards_per_func: of the on-policy rows, NaN where a function returned None.
        rewards: their total reward, by group.
        reward_func_names: TRL's names of the functions.
        lengths, is_truncated: of the same rows, in tokens.
        scale_rewards: TRL's setting: whose standard deviation is looked at for being 0.
    """
    std = nanstd(rewards.flatten() if scale_rewards == "batch" else rewards, dim=-1)
    terminated = lengths[~is_truncated].float() if (~is_truncated).any() else torch.zeros(1)
    metrics = {
        "reward": rewards.nanmean(),
        "reward_std": nanstd(rewards.flatten(), dim=0),
        "frac_reward_zero_std": torch.isclose(std, torch.zeros_like(std)).float().mean(),
        "completions/mean_length": lengths.float().mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": is_truncated.float().mean(),
        "completions/mean_terminated_length": terminated.mean(),
        "completions/min_terminated_length": terminated.min(),
        "completions/max_terminated_length": terminated.max(),
    }
    for i, name in enumerate(reward_func_names):
        metrics[f"rewards/{name}/mean"] = rewards_per_func[:, i].nanmean()
        metrics[f"rewards/{name}/std"] = nanstd(rewards_per_func[:, i], dim=0)
    return {name: float(value) for name, value in metrics.items()}


def reward_metrics(rewards: BatchRewards) -> dict[str, float]:
    """Rewards of all kinds of rows apart, and the share of groups that guidance rescued."""
    sampled, is_guided, is_injected = rewards.sampled, rewards.is_guided, rewards.is_injected
    is_helped = (rewards.is_correct & (is_guided | is_injected)).any(1)
    metrics = {
        "guidance/reward/on_policy": sampled[~is_guided].nanmean().item(),
        "guidance/rescued_groups": (is_helped & ~(rewards.was_correct & ~is_guided).any(1)).float().mean().item(),
    }
    for kind, values in {"guided": sampled[is_guided], "injected": rewards.now[is_injected]}.items():
        if values.numel():
            metrics[f"guidance/reward/{kind}"] = values.nanmean().item()
    return metrics


def injection_metrics(
    injection: Injection, is_accepted: list[bool], num_groups: int, num_rows: int
) -> dict[str, float]:
    """What was injected, why, and what came of earlier injections, by the names of docs/metrics.md; what there is no data for is left out.

    Args:
        injection: of all processes.
        is_accepted: for each of its choices, whether it is correct.
        num_groups, num_rows: of the batch, over all processes.
    """
    prefix, injected, total = "guidance/injection", injection.injected, len(injection.choices)
    metrics = {
        f"{prefix}/rows": len(injected) / num_rows,
        f"{prefix}/groups": len({choice.group for choice in injected}) / num_groups,
        **{f"{prefix}/trigger/{name}": share for name, share in injection.fired.items()},
    }
    if injection.num_read:
        metrics[f"{prefix}/overlong"] = injection.num_overlong / injection.num_read
    if injection.choices:
        metrics[f"{prefix}/accepted"] = sum(is_accepted) / total
        for name, times in Counter(choice.selector for choice in injection.choices).items():
            metrics[f"{prefix}/selector/{name}"] = times / total
    for source in {choice.completion.source for choice in injection.choices} - {None}:
        verdicts = [
            accepted
            for choice, accepted in zip(injection.choices, is_accepted, strict=True)
            if choice.completion.source == source
        ]
        times = sum(choice.completion.source == source for choice in injected)
        metrics[f"{prefix}/source/{source}/rows"] = times / num_rows
        metrics[f"{prefix}/source/{source}/accepted"] = sum(verdicts) / len(verdicts)
    if injected:
        lengths = [len(choice.completion.token_ids) for choice in injected]
        metrics[f"{prefix}/completions/mean_length"] = sum(lengths) / len(lengths)
    if injection.effects:
        changes = [effect.change for effect in injection.effects]
        metrics[f"{prefix}/success_change"] = sum(changes) / len(changes)
    predicted = [effect.predicted for effect in injection.effects if effect.predicted is not None]
    if predicted:
        metrics[f"{prefix}/predicted_change"] = sum(predicted) / len(predicted)
    return metrics


def rollout_sums(rollout: GuidedRollout) -> dict[str, float]:
    """What one process's rollouts add to the sums behind `rollout_metrics` and `importance_metrics`."""
    drawn = sum(map(sum, rollout.expert_drawn))
    ratio = importance_ratio(rollout)
    return {
        "rows": len(rollout.completion_ids),
        "tokens": rollout.num_tokens,
        "weight": sum(map(sum, rollout.guidance_weights)),
        "expert_drawn": drawn,
        "drafted": rollout.num_drafted,
        "accepted": rollout.num_tokens - drawn,
        "policy_forwards": rollout.policy_forwards,
        "expert_forwards": rollout.expert_forwards,
        "ratio": ratio.sum().item(),
        "ratio_squared": ratio.square().sum().item(),
    }


def rollout_metrics(sums: dict[str, float]) -> dict[str, float]:
    """How the guided rollouts came about, from `rollout_sums` added up over processes, by the names of docs/metrics.md."""
    tokens = sums["tokens"]
    metrics = {
        "guidance/completions/mean_length": tokens / sums["rows"],
        "guidance/weight": sums["weight"] / tokens,
        "guidance/expert_drawn": sums["expert_drawn"] / tokens,
        "guidance/policy_forwards_per_token": sums["policy_forwards"] / tokens,
        "guidance/expert_forwards_per_token": sums["expert_forwards"] / tokens,
    }
    if sums["drafted"]:
        metrics["guidance/acceptance_rate"] = sums["accepted"] / sums["drafted"]
        metrics["guidance/draft_length"] = sums["drafted"] / sums["expert_forwards"]
    return metrics


def importance_metrics(sums: dict[str, float], p99: float) -> dict[str, float]:
    """How far the guided tokens lie off the policy, from `rollout_sums` added up over processes, and the largest 99th percentile."""
    return {
        "guidance/importance_ratio/mean": sums["ratio"] / sums["tokens"],
        "guidance/importance_ratio/p99": p99,
        "guidance/importance_ratio/ess": sums["ratio"] ** 2 / (sums["tokens"] * sums["ratio_squared"]),
    }


def importance_ratio(rollout: GuidedRollout) -> Float[Tensor, "tokens"]:
    """pi_theta / pi_mix of every token of all rows, in one line."""
    return torch.cat(rollout.log_ratios()).exp()


def importance_ratio_p99(rollout: GuidedRollout) -> float:
    """The ratio that 99 of 100 tokens do not exceed."""
    ratio = importance_ratio(rollout)
    return ratio.kthvalue(math.ceil(0.99 * ratio.numel())).values.item()
