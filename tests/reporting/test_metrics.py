"""The numbers of a guided batch, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from trl_selective.experts import ExpertCompletion
from trl_selective.injection import Choice, Injection
from trl_selective.reporting.metrics import (
    importance_metrics,
    importance_ratio,
    importance_ratio_p99,
    injection_metrics,
    policy_metrics,
    reward_metrics,
    rollout_metrics,
    rollout_sums,
)
from trl_selective.reward_scale import BatchRewards, RewardScale
from trl_selective.rollout import GuidedRollout
from trl_selective.selection import Effect

LOG2 = math.log(2)
ROLLOUT = GuidedRollout(
    completion_ids=[[1, 2, 3], [4]],
    sampling_per_token_logps=[[-1.0, -1.0, -1.0], [-2.0]],
    policy_per_token_logps=[[-1.0, -1.0 - LOG2, -1.0], [-2.0 + LOG2]],  # ratios 1, 1/2, 1, 2
    guidance_weights=[[0.0, 0.5, 0.1], [1.0]],
    entropies=[[0.0, 1.0, 0.2], [2.0]],
    expert_drawn=[[False, True, False], [False]],
    policy_forwards=8,
    expert_forwards=2,
    num_drafted=6,
)


def test_rollout_metrics():
    metrics = rollout_metrics(rollout_sums(ROLLOUT))
    assert metrics == pytest.approx(
        {
            "guidance/completions/mean_length": 2.0,  # (3 + 1) / 2
            "guidance/weight": 0.4,  # (0 + 0.5 + 0.1 + 1) / 4
            "guidance/expert_drawn": 0.25,  # 1 of 4
            "guidance/policy_forwards_per_token": 2.0,  # 8 / 4
            "guidance/expert_forwards_per_token": 0.5,  # 2 / 4
            "guidance/acceptance_rate": 0.5,  # 3 accepted of 6 drafted
            "guidance/draft_length": 3.0,  # 6 drafted in 2 expert forwards
        }
    )


@pytest.mark.parametrize("nobody_ends", [False, True])
def test_policy_metrics(nobody_ends):
    rewards = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    is_truncated = torch.tensor([True, False, False, nobody_ends]) | nobody_ends
    metrics = policy_metrics(
        rewards.view(-1, 1), rewards, ["answer"], torch.tensor([9, 4, 2, 6]), is_truncated, "group"
    )
    std = math.sqrt((0.5**2 * 2) / 3)
    assert metrics == pytest.approx(
        {
            "reward": 0.5,
            "reward_std": std,
            "frac_reward_zero_std": 0.5,
            "completions/mean_length": 21 / 4,
            "completions/min_length": 2,
            "completions/max_length": 9,
            "completions/clipped_ratio": 1.0 if nobody_ends else 0.25,
            "completions/mean_terminated_length": 0 if nobody_ends else 4,
            "completions/min_terminated_length": 0 if nobody_ends else 2,
            "completions/max_terminated_length": 0 if nobody_ends else 6,
            "rewards/answer/mean": 0.5,
            "rewards/answer/std": std,
        }
    )


def test_importance_metrics():
    assert importance_metrics(rollout_sums(ROLLOUT), p99=2.0) == pytest.approx(
        {
            "guidance/importance_ratio/mean": 1.125,  # (1 + 1/2 + 1 + 2) / 4
            "guidance/importance_ratio/p99": 2.0,
            "guidance/importance_ratio/ess": 0.81,  # 4.5^2 / (4 (1 + 1/4 + 1 + 4)) = 20.25 / 25
        }
    )


def test_sums_add_up_over_processes():
    sums = rollout_sums(ROLLOUT)
    twice = {name: 2 * value for name, value in sums.items()}
    assert rollout_metrics(twice) == pytest.approx(rollout_metrics(sums))
    assert importance_metrics(twice, 2.0) == pytest.approx(importance_metrics(sums, 2.0))


def test_importance_ratio():
    torch.testing.assert_close(importance_ratio(ROLLOUT), torch.tensor([1, 0.5, 1, 2], dtype=torch.float64))
    assert importance_ratio_p99(ROLLOUT) == pytest.approx(2.0)  # rank ceil(0.99 * 4) = 4


def rows(*flags: list[int]) -> torch.Tensor:
    return torch.tensor(flags).bool()


def batch_rewards(sampled, now, is_guided, is_injected) -> BatchRewards:
    scale = RewardScale(["only"], torch.ones(1), sampled.size(1))
    return scale.of_batch(sampled.view(-1, 1), now.view(-1, 1), is_guided, is_injected)


def test_rewards_of_all_kinds_of_rows():
    # two rollouts of the policy, one guided; in the first two groups a completion has taken the place of the second rollout
    sampled = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.4], [0.0, 0.2, 0.0]])
    is_guided, is_injected = rows(*[[0, 0, 1]] * 4), rows([0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0])
    now = sampled.masked_fill(is_injected, 0.9)
    assert reward_metrics(batch_rewards(sampled, now, is_guided, is_injected)) == pytest.approx(
        {
            "guidance/reward/on_policy": 1.2 / 8,  # the replaced rollouts included
            "guidance/reward/guided": 0.6,  # 2.4 / 4
            "guidance/reward/injected": 0.9,
            "guidance/rescued_groups": 1 / 4,  # the first; the second was right by itself, the others stay wrong
        }
    )


def test_kinds_that_a_batch_does_not_have_are_left_out():
    sampled, nobody = torch.tensor([[0.0, math.nan], [1.0, 0.0]]), rows([0, 0], [0, 0])
    metrics = reward_metrics(batch_rewards(sampled, sampled, nobody, nobody))
    assert metrics == {"guidance/reward/on_policy": pytest.approx(1 / 3), "guidance/rescued_groups": 0.0}


@pytest.mark.parametrize(
    ("sampled", "now", "is_guided", "is_injected", "rescued"),
    [
        ([0.0, 0.0], [0.0, 1.0], [0, 0], [0, 1], 1.0),  # by a completion
        ([0.0, 1.0], [0.0, 1.0], [0, 1], [0, 0], 1.0),  # by a guided rollout
        ([0.0, 1.0], [1.0, 1.0], [0, 1], [1, 0], 1.0),  # by both
        ([0.0, 1.0], [0.0, 0.0], [0, 1], [0, 1], 0.0),  # a right guided rollout gave way to a wrong completion
        ([1.0, 0.0], [1.0, 1.0], [0, 0], [0, 1], 0.0),  # it was right by itself
        ([1.0, 0.0], [1.0, 0.0], [0, 0], [1, 0], 0.0),  # also if it is a right rollout that gave way
        ([0.0, 0.0], [0.0, 0.3], [0, 0], [0, 1], 0.0),  # by a wrong completion
        ([0.0, math.nan], [0.0, 1.0], [0, 0], [0, 1], 1.0),
        ([0.0, 0.0], [0.0, math.nan], [0, 1], [0, 0], 0.0),
    ],
)
def test_what_rescues_a_group(sampled, now, is_guided, is_injected, rescued):
    rewards = batch_rewards(torch.tensor([sampled]), torch.tensor([now]), rows(is_guided), rows(is_injected))
    assert reward_metrics(rewards)["guidance/rescued_groups"] == rescued


# ---- Injected completions --------------------------------------------------------------------------------------------------------------


def make_choice(group: int, row: int | None, length: int, source: str | None, selector: str) -> Choice:
    completion = ExpertCompletion(tuple(range(length)), source=source)
    return Choice(group, completion, selector, score=0.5, rewards_per_func=[1.0], row=row)


INJECTION = Injection(
    choices=[
        make_choice(0, 3, 10, "a", "reward_gain"),
        make_choice(0, 2, 20, "b", "reward_gain"),
        make_choice(2, None, 99, "a", "shortest"),  # stays out
        make_choice(4, 19, 30, None, "reward_gain"),
    ],
    effects=[Effect([1.0], 0.25, 0.5), Effect(None, None, -0.25), Effect([1.0], 0.0, 0.0)],
    fired={"group_failed": 0.75, "below": 0.5},
    num_read=12,
    num_overlong=3,
)


def test_injection_metrics():
    metrics = injection_metrics(INJECTION, [True, False, False, True], num_groups=5, num_rows=20)
    assert metrics == pytest.approx(
        {
            "guidance/injection/rows": 3 / 20,
            "guidance/injection/groups": 2 / 5,
            "guidance/injection/trigger/group_failed": 0.75,
            "guidance/injection/trigger/below": 0.5,
            "guidance/injection/overlong": 3 / 12,
            "guidance/injection/accepted": 2 / 4,  # of all that were chosen
            "guidance/injection/selector/reward_gain": 3 / 4,
            "guidance/injection/selector/shortest": 1 / 4,
            "guidance/injection/source/a/rows": 1 / 20,
            "guidance/injection/source/a/accepted": 1 / 2,  # the one that stays out counts
            "guidance/injection/source/b/rows": 1 / 20,
            "guidance/injection/source/b/accepted": 0 / 1,
            "guidance/injection/completions/mean_length": 20.0,  # (10 + 20 + 30) / 3
            "guidance/injection/success_change": 0.25 / 3,  # (0.5 - 0.25 + 0) / 3
            "guidance/injection/predicted_change": 0.25 / 2,  # of those that were predicted
        }
    )


def test_what_there_is_no_data_for_is_left_out():
    nothing = Injection(choices=[], effects=[], fired={"always": 0.0}, num_read=0, num_overlong=0)
    assert injection_metrics(nothing, [], num_groups=5, num_rows=20) == {
        "guidance/injection/rows": 0.0,
        "guidance/injection/groups": 0.0,
        "guidance/injection/trigger/always": 0.0,
    }
    stays_out = replace(nothing, choices=[make_choice(0, None, 9, None, "first")], num_read=1)
    metrics = injection_metrics(stays_out, [False], num_groups=5, num_rows=20)
    assert "guidance/injection/completions/mean_length" not in metrics
    assert metrics["guidance/injection/accepted"] == metrics["guidance/injection/overlong"] == 0.0
    judged = replace(nothing, effects=[Effect(None, None, 0.5)])
    metrics = injection_metrics(judged, [], num_groups=5, num_rows=20)
    assert metrics["guidance/injection/success_change"] == 0.5
    assert "guidance/injection/predicted_change" not in metrics


# ---- The policy's own rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale_rewards", "expected"), [("group", 1.0), ("none", 1.0), ("batch", 0.0)])
def test_without_variance_as_trl_means_it(scale_rewards, expected):
    """Groups that agree within and differ from one another: only the batch has variance."""
    rewards, lengths = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([1, 1, 1, 1])
    metrics = policy_metrics(rewards.view(4, 1), rewards, ["a"], lengths, lengths > 1, scale_rewards)
    assert metrics["frac_reward_zero_std"] == expected


def test_policy_metrics_leave_out_what_could_not_be_scored():
    per_func = torch.tensor([[1.0, 0.0], [0.0, math.nan], [math.nan, math.nan], [1.0, 1.0]])
    rewards = torch.tensor([[1.0, 0.0], [math.nan, 2.0]])
    lengths, truncated = torch.tensor([2, 4, 6, 8]), torch.tensor([False, False, False, True])
    metrics = policy_metrics(per_func, rewards, ["a", "b"], lengths, truncated, "group")
    assert metrics["reward"] == pytest.approx(1.0)  # (1 + 0 + 2) / 3
    assert metrics["reward_std"] == pytest.approx(1.0)  # of 1, 0, 2
    assert metrics["rewards/a/mean"] == pytest.approx(2 / 3)
    assert metrics["rewards/b/mean"] == pytest.approx(0.5)
    assert metrics["completions/mean_length"] == 5.0
    assert metrics["completions/mean_terminated_length"] == 4.0  # (2 + 4 + 6) / 3
    assert metrics["completions/clipped_ratio"] == 0.25


def test_no_completion_ended():
    metrics = policy_metrics(
        torch.ones(2, 1), torch.ones(1, 2), ["a"], torch.tensor([3, 3]), torch.tensor([True, True]), "group"
    )
    assert metrics["completions/mean_terminated_length"] == 0.0
    assert metrics["frac_reward_zero_std"] == 1.0
