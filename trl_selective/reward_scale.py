"""What rewards mean in a run: how much a rollout has in all, how much it could have, and whether it is right. Knows nothing of TRL."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_selective.functional.advantages import is_correct, reward_span, total_reward

ROUNDING = 1e-5  # by which a sum of weighted rewards may be off


@dataclass(frozen=True)
class BatchRewards:
    """The total rewards of a batch, before and after expert completions took the places of rollouts. They are NaN where no function scored a row.

    Attributes:
        sampled: of the rollouts.
        now: the same, with those of injected completions in their places.
        is_guided: which rollouts were guided.
        is_injected: which of them were replaced.
        was_correct, is_correct: which are right of `sampled`, and of `now`.
        span: R_range of each group.
    """

    sampled: Float[Tensor, "groups generations"]
    now: Float[Tensor, "groups generations"]
    is_guided: Bool[Tensor, "groups generations"]
    is_injected: Bool[Tensor, "groups generations"]
    was_correct: Bool[Tensor, "groups generations"]
    is_correct: Bool[Tensor, "groups generations"]
    span: Float[Tensor, "groups 1"]


@dataclass(frozen=True)
class RewardScale:
    """Reads the rewards of rows that lie group by group. They are NaN where a function gave None.

    Attributes:
        names: of the reward functions.
        weights: (functions,).
        num_generations: rows of a group.
        reward_range: R_range, the span of the total reward; None if each function spans [0, 1].
        correctness_reward: the function that tells right from wrong; None if the total reward does.

    Raises:
        ValueError: if `correctness_reward` is no reward function.
    """

    names: Sequence  # not Sequence[str]: in the tests beartype would draw from `random` to check an element, and change the run
    weights: Float[Tensor, "funcs"]
    num_generations: int
    reward_range: float | None = None
    correctness_reward: str | None = None

    def __post_init__(self):
        if self.correctness_reward is not None:
            check_correctness_reward(self.correctness_reward, self.names)

    def totals(self, rewards_per_func: Float[Tensor, "rows funcs"]) -> Float[Tensor, "groups generations"]:
        """Weighted sums, NaN where no function scored a row."""
        weights = self.weights.to(rewards_per_func.device)
        return total_reward(rewards_per_func, weights).view(-1, self.num_generations)

    def span(self, *rewards_per_func: Float[Tensor, "rows funcs"]) -> Float[Tensor, "groups 1"]:
        """R_range of each group: `reward_range`, or by the functions that scored any of its rows in any of the tensors."""
        given = torch.cat([part.unflatten(0, (-1, self.num_generations)) for part in rewards_per_func], dim=1)
        if self.reward_range is None:
            return reward_span(given, self.weights.to(given.device))
        return given.new_full((len(given), 1), self.reward_range)

    def is_correct(
        self, rewards_per_func: Float[Tensor, "rows funcs"], span: Float[Tensor, "groups 1"]
    ) -> Bool[Tensor, "groups rows_of_each"]:
        """Which rows are right, as many of each group, with the span of its rewards."""
        weights = self.weights.to(rewards_per_func.device)
        rewards = total_reward(rewards_per_func, weights).view(len(span), -1)
        if self.correctness_reward is None:
            return is_correct(rewards, span)
        deciding = self.names.index(self.correctness_reward)
        return is_correct(rewards, span, rewards_per_func[:, deciding].view_as(rewards))

    def of_batch(
        self,
        before: Float[Tensor, "rows funcs"],
        now: Float[Tensor, "rows funcs"],
        is_guided: Bool[Tensor, "groups generations"],
        is_injected: Bool[Tensor, "groups generations"],
    ) -> BatchRewards:
        """What the rewards of whole groups mean, `before` and after (`now`) expert completions took the places of rollouts."""
        span = self.span(before, now)
        return BatchRewards(
            self.totals(before),
            self.totals(now),
            is_guided,
            is_injected,
            was_correct=self.is_correct(before, span),
            is_correct=self.is_correct(now, span),
            span=span,
        )

    def problems(
        self,
        rewards_per_func: Float[Tensor, "rows funcs"],
        rewards: Float[Tensor, "groups generations"],
        verdicts: Bool[Tensor, "groups generations"],
        *,
        divides: bool,
    ) -> dict[str, str]:
        """What does not fit in the rewards of a batch, by the setting that would mend it.

        Args:
            rewards_per_func: of whole groups.
            rewards, verdicts: their `totals`, and what `is_correct` says of them.
            divides: whether an advantage is divided by the span.
        """
        is_by_total = self.correctness_reward is None
        problems = {}
        if self.reward_range is None and (divides or is_by_total):
            problems["reward_range"] = _unit_problem(rewards_per_func, self.weights, self.names)
        elif self.reward_range is not None and is_by_total:
            problems["reward_range"] = _range_problem(rewards, self.reward_range)
        if is_by_total:
            problems["correctness_reward"] = _penalty_problem(self.weights, self.reward_range) or _verdict_problem(
                rewards, verdicts, self.names
            )
        return {setting: problem for setting, problem in problems.items() if problem}


def check_correctness_reward(name: str, reward_func_names: Sequence[str]) -> None:
    """Refuse a `correctness_reward` that is no reward function.

    Raises:
        ValueError: naming those that are.
    """
    if reward_func_names.count(name) > 1:
        raise ValueError(
            f"correctness_reward={name!r} is the name of {reward_func_names.count(name)} reward functions. Give them names of their own (`__name__`)."
        )
    if name not in reward_func_names:
        raise ValueError(
            f"correctness_reward must be one of the reward functions {list(reward_func_names)}, got {name!r}. A function that shall decide and "
            "not count may have the weight 0 in reward_weights."
        )


def _unit_problem(rewards_per_func: Tensor, reward_weights: Tensor, names: Sequence[str]) -> str | None:
    """Says why rewards contradict that each function spans [0, 1], as an unset `reward_range` takes it; None if they do not.

    Args:
        rewards_per_func: (rows, functions), NaN where a function gave None.
        reward_weights: (functions,); those of weight 0 do not count.
        names: of the functions.
    """
    for name, weight, rewards in zip(names, reward_weights.tolist(), rewards_per_func.unbind(1), strict=True):
        outside = rewards[(rewards < -ROUNDING) | (rewards > 1 + ROUNDING)]
        if weight and len(outside):
            return (
                f"Reward function {name!r} gives {outside[0].item():g}, but with reward_range unset each is taken to span [0, 1]: guided and "
                "injected rows count too much or too little, and a rollout is correct above half of that span. Set reward_range to the span of "
                "the total reward; and where it does not begin at 0, correctness_reward to the function that tells right from wrong."
            )
    return None


def _range_problem(rewards: Tensor, reward_range: float) -> str | None:
    """Says why rewards contradict a `reward_range` above whose half they are taken to be correct; None if they do not.

    Args:
        rewards: total rewards, any shape, NaN where no function gave one.
        reward_range: their span.
    """
    outside = rewards[(rewards < -ROUNDING) | (rewards > reward_range * (1 + ROUNDING))]
    if not len(outside):
        return None
    return (
        f"A rollout has the total reward {outside[0].item():g}, but those with more than half of reward_range={reward_range:g} are taken to be "
        "correct, as if rewards lay between 0 and it. Set reward_range to their span; and where they do not begin at 0, correctness_reward to the "
        "function that tells right from wrong."
    )


def _penalty_problem(reward_weights: Tensor, reward_range: float | None) -> str | None:
    """Says why a rollout that is right, but gets every penalty, counts as wrong; None if it counts as right, or there are no penalties."""
    gain, penalty = reward_weights.clamp(min=0).sum().item(), reward_weights.clamp(max=0).abs().sum().item()
    bound = (gain + penalty if reward_range is None else reward_range) / 2
    if not penalty or gain - penalty > bound:
        return None
    return (
        f"reward_weights has negative ones, so that a rollout may have no more than {gain - penalty:g} though it is right: it counts as correct above "
        f"half of reward_range, {bound:g}. Set correctness_reward to the function that tells right from wrong."
    )


def _verdict_problem(rewards: Tensor, is_correct: Tensor, names: Sequence[str]) -> str | None:
    """Says why the verdict "correct" is in doubt where all rollouts get it although they differ; None if they do not.

    Args:
        rewards, is_correct: of rollouts, any shape; rewards are NaN where no function gave one.
        names: of the reward functions.
    """
    is_scored = ~rewards.isnan()
    scored = rewards[is_scored]
    if len(names) < 2 or not len(scored) or not is_correct[is_scored].all() or scored.min() == scored.max():
        return None
    return (
        f"All rollouts of a batch count as correct, since their total rewards ({scored.min().item():g} to {scored.max().item():g}) exceed half "
        f"of reward_range: no group has failed, and none can be rescued. If that is not so, set correctness_reward to that of {list(names)} "
        "which tells right from wrong."
    )
