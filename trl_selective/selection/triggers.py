"""Whether a group gets any expert completion: a trigger looks at the rewards of its own rollouts, and at nothing else.

Triggers are combined with `&` and `|`. A group that none fires for keeps its rollouts, and nothing is computed for it. With
`ZeroVariance`, and with `GroupFailed` where all wrong rollouts have the same reward, injection costs no learning signal: the rollouts that make
room have the advantage 0.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trl_selective.functional.advantages import nanstd
from trl_selective.functional.schedules import Schedule, constant


@dataclass(frozen=True)
class GroupOutcomes:
    """What a trigger knows of all groups of a batch, those of other processes included.

    Attributes:
        rewards: total rewards of the on-policy rollouts, NaN where no function scored one, or where a rollout was guided.
        is_correct: which of them are right.
        noise: one number in [0, 1) for each group. All triggers of a batch see the same.
        step: optimizer steps so far.
    """

    rewards: Float[Tensor, "groups rows"]
    is_correct: Bool[Tensor, "groups rows"]
    noise: Float[Tensor, "groups"]
    step: int

    @property
    def is_scored(self) -> Bool[Tensor, "groups"]:
        """Groups with at least one reward. No trigger fires for the others: nothing is known of them."""
        return (~self.rewards.isnan()).any(dim=1)


class Trigger(ABC):
    """Says for each group whether it may get expert completions."""

    @property
    def name(self) -> str:
        """What it is called in logs."""
        return type(self).__name__

    def __call__(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        """The groups that it fires for.

        Raises:
            ValueError: if `fires` says something else than yes or no for each group.
        """
        fires = self.fires(outcomes)
        if getattr(fires, "dtype", None) != torch.bool or fires.shape != outcomes.is_scored.shape:
            raise ValueError(
                f"The trigger {self.name!r} returned {fires!r}, expected a tensor of {len(outcomes.is_scored)} booleans, one for each group."
            )
        return fires & outcomes.is_scored

    @abstractmethod
    def fires(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        """The rule. Groups that nothing scored are left out afterwards."""

    def parts(self) -> list["Trigger"]:
        """The single triggers that it is made of."""
        return [self]

    def __and__(self, other: "Trigger") -> "Trigger":
        return Combined("&", self, other)

    def __or__(self, other: "Trigger") -> "Trigger":
        return Combined("|", self, other)


OPERATIONS = {"&": torch.logical_and, "|": torch.logical_or}


@dataclass(frozen=True)
class Combined(Trigger):
    """Two triggers joined by a logical operation, "&" or "|"."""

    operation: str
    left: Trigger
    right: Trigger

    @property
    def name(self) -> str:
        return f"{self.left.name} {self.operation} {self.right.name}"

    def fires(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        return OPERATIONS[self.operation](self.left(outcomes), self.right(outcomes))

    def parts(self) -> list[Trigger]:
        return self.left.parts() + self.right.parts()


@dataclass(frozen=True)
class Always(Trigger):
    """Every group, as LUFFY does (arXiv:2504.14945)."""

    name = "always"

    def fires(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        return torch.ones_like(outcomes.noise, dtype=torch.bool)


@dataclass(frozen=True)
class GroupFailed(Trigger):
    """Groups none of whose own rollouts is right."""

    name = "group_failed"

    def fires(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        return ~outcomes.is_correct.any(dim=1)


@dataclass(frozen=True)
class ZeroVariance(Trigger):
    """Groups whose own rollouts all have the same reward, so that GRPO learns nothing from them: all failed, or all succeeded."""

    name = "zero_variance"

    def fires(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        std = nanstd(outcomes.rewards, dim=1).nan_to_num(nan=0.0)  # a single reward does not vary either
        return torch.isclose(std, torch.zeros_like(std))


@dataclass(frozen=True)
class Below(Trigger):
    """Groups whose mean reward is at most `threshold`.

    Args:
        threshold: tau, in units of the total reward.
    """

    threshold: float

    name = "below"

    def fires(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        return outcomes.rewards.nanmean(dim=1) <= self.threshold


@dataclass(frozen=True)
class WithProbability(Trigger):
    """Each group with a probability that may change over training: a frequency schedule.

    Args:
        probability: in [0, 1], or a schedule step -> probability.
    """

    probability: float | Schedule

    name = "with_probability"

    def fires(self, outcomes: GroupOutcomes) -> Bool[Tensor, "groups"]:
        schedule = self.probability if callable(self.probability) else constant(self.probability)
        return outcomes.noise < schedule(outcomes.step)
