"""The numbers of a guided batch, by hand."""

import math

import pytest
import torch

from trl_selective.reporting.metrics import (
    importance_metrics,
    importance_ratio,
    importance_ratio_p99,
    policy_metrics,
    reward_metrics,
    rollout_metrics,
    rollout_sums,
)
from trl_selective.rollout import GuidedRollout

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


def test_reward_metrics():
    on_policy = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    guided = torch.tensor([[1.0], [1.0], [0.4]])
    assert reward_metrics(on_policy, guided, reward_range=torch.ones(3, 3)) == pytest.approx(
        {
            "guidance/reward/on_policy": 1 / 6,
            "guidance/reward/guided": 0.8,  # 2.4 / 3
            "guidance/rescued_groups": 1 / 3,  # the first; the second was right by itself, the third stays wrong
        }
    )


def test_a_rollout_is_correct_by_the_range_of_its_own_rewards():
    on_policy, guided = torch.tensor([[0.4], [0.4]]), torch.tensor([[0.6], [0.6]])
    reward_range = torch.tensor([[1.0, 1.0], [2.0, 2.0]])  # 0.6 is more than half of 1, and less than half of 2
    assert reward_metrics(on_policy, guided, reward_range)["guidance/rescued_groups"] == 0.5


@pytest.mark.parametrize(("own_range", "guided_range", "rescued"), [(1.0, 1.0, 0.0), (1.0, 2.0, 0.0), (2.0, 1.0, 1.0)])
def test_ranges_may_differ_within_a_group(own_range, guided_range, rescued):
    """Both rewards are 0.6: correct where the range is 1, wrong where it is 2."""
    rewards, reward_range = torch.tensor([[0.6]]), torch.tensor([[own_range, guided_range]])
    assert reward_metrics(rewards, rewards, reward_range)["guidance/rescued_groups"] == rescued


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
