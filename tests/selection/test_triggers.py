"""Which groups may get an expert completion."""

from dataclasses import dataclass

import pytest
import torch

from trl_selective.functional import linear
from trl_selective.selection import (
    Always,
    Below,
    GroupFailed,
    GroupOutcomes,
    Trigger,
    WithProbability,
    ZeroVariance,
)

NAN = float("nan")
GROUPS = {
    "failed": [0.0, 0.0, 0.0],
    "failed_with_variance": [0.0, 0.1, 0.0],  # 0.1 for the format, say: not right
    "mixed": [0.0, 1.0, 1.0],
    "solved": [1.0, 1.0, 1.0],
    "partly_scored": [NAN, 0.0, 0.0],
    "scored_once": [NAN, NAN, 0.0],
    "unscored": [NAN, NAN, NAN],
}
NAMES = list(GROUPS)


def outcomes(noise=0.5, step=0, groups=GROUPS) -> GroupOutcomes:
    rewards = torch.tensor(list(groups.values()))
    noise = torch.as_tensor(noise, dtype=torch.float64).expand(len(rewards))
    return GroupOutcomes(rewards, is_correct=rewards > 0.5, noise=noise, step=step)


def fired(trigger: Trigger, **changes) -> set[str]:
    return {name for name, fires in zip(NAMES, trigger(outcomes(**changes)).tolist(), strict=True) if fires}


SCORED = set(NAMES) - {"unscored"}
FAILED = {"failed", "failed_with_variance", "partly_scored", "scored_once"}
WITHOUT_VARIANCE = {"failed", "solved", "partly_scored"}


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (Always(), SCORED),
        (GroupFailed(), FAILED),
        (Below(0.0), FAILED - {"failed_with_variance"}),
        (Below(0.04), FAILED),  # the mean of 0, 0.1, 0 is 0.033
        (Below(2 / 3), FAILED | {"mixed"}),
        (Below(1.0), SCORED),
        (Below(-0.1), set()),
        (WithProbability(0.6), SCORED),
        (WithProbability(0.5), set()),  # the noise is 0.5
    ],
)
def test_which_groups_a_trigger_fires_for(trigger, expected):
    assert fired(trigger) == expected


def test_groups_without_variance():
    """A single reward does not vary either."""
    assert fired(ZeroVariance()) == WITHOUT_VARIANCE | {"scored_once"}


@pytest.mark.parametrize("trigger", [Always(), GroupFailed(), ZeroVariance(), Below(1e9), WithProbability(1.0)])
def test_nothing_fires_for_a_group_that_nothing_scored(trigger):
    for each in (trigger, trigger | trigger, trigger & trigger):
        assert "unscored" not in fired(each, noise=0.0)


def test_both_or_either():
    a, b = GroupFailed(), ZeroVariance()
    assert fired(a & b) == fired(a) & fired(b) != fired(a)
    assert fired(a | b) == fired(a) | fired(b) != fired(b)
    c = Below(2 / 3)
    assert fired(a & b | c) == fired(a) & fired(b) | fired(c)
    assert fired(a & (b | c)) == fired(a) & (fired(b) | fired(c))
    assert [part.name for part in (a & b | c).parts()] == ["group_failed", "zero_variance", "below"]
    assert [part.name for part in a.parts()] == ["group_failed"]


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_with_probability_fires_that_often(probability, expected):
    rewards = torch.zeros(10_000, 2)
    noise = torch.rand(10_000, dtype=torch.float64)
    noise[0], noise[1] = 0.0, 1 - 2**-53  # the ends of [0, 1)
    fires = WithProbability(probability)(GroupOutcomes(rewards, rewards > 0, noise, step=0))
    assert fires.double().mean().item() == pytest.approx(expected, abs=0.02 * (0 < expected < 1))  # 4 standard errors


def test_a_probability_that_falls_over_training():
    trigger = WithProbability(linear(1.0, 0.0, steps=10))
    noise = torch.tensor([0.05, 0.25, 0.45, 0.65, 0.85])
    rewards = torch.zeros(5, 2)
    # 1 at step 0, 0.5 at step 5, 0.1 at step 9, 0 from step 10 on
    for step, count in {0: 5, 5: 3, 9: 1, 10: 0, 99: 0}.items():
        assert trigger(GroupOutcomes(rewards, rewards > 0, noise.double(), step)).tolist() == [True] * count + [
            False
        ] * (5 - count)


def test_all_triggers_of_a_batch_see_the_same_noise():
    """So that `with_probability` in two places of an expression is one decision."""
    trigger = WithProbability(0.5)
    noise = torch.rand(len(NAMES), dtype=torch.float64)
    assert (
        fired(trigger & trigger, noise=noise) == fired(trigger | trigger, noise=noise) == fired(trigger, noise=noise)
    )


def test_a_trigger_of_ones_own():
    @dataclass(frozen=True)
    class BestBelow(Trigger):
        """Groups whose best rollout has less than this."""

        bound: float

        def fires(self, outcomes):
            return outcomes.rewards.nan_to_num(nan=-1.0).amax(1) < self.bound

    assert BestBelow(0.05).name == "BestBelow"
    assert fired(BestBelow(0.05)) == FAILED - {"failed_with_variance"}
    assert fired(BestBelow(0.05) & ZeroVariance()) == {"failed", "partly_scored"} | (
        fired(ZeroVariance()) & {"scored_once"}
    )


@pytest.mark.parametrize("says", [torch.tensor([0.0, 1.0]), torch.tensor([True]), [True, False], None])
def test_what_is_no_answer_is_named(says):
    class Odd(Trigger):
        def fires(self, outcomes):
            return says

    two = {name: GROUPS[name] for name in ("failed", "mixed")}
    with pytest.raises(ValueError, match=r"The trigger 'Odd' returned .*, expected a tensor of 2 booleans"):
        Odd()(outcomes(groups=two))


def test_a_trigger_as_a_base_says_nothing():
    with pytest.raises(TypeError, match="abstract"):
        Trigger()
