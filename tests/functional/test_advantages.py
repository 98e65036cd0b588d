"""Eq. 10 and 11 of arXiv:2510.04140 in numbers, with rewards that are missing."""

import pytest
import torch
from trl.trainer import utils as trl_utils

from trl_selective.functional import guided_advantages, on_policy_advantages, reward_span, total_reward
from trl_selective.functional.advantages import nanstd

NAN = float("nan")


def test_on_policy_worked_numbers():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    # mean 0.5; std = sqrt(4 * 0.25 / 3) = 0.577350; 0.5 / (0.577350 + 0.0001) = 0.865875
    expected = torch.tensor([[0.865875, -0.865875, -0.865875, 0.865875]])
    torch.testing.assert_close(on_policy_advantages(rewards), expected, rtol=0, atol=1e-6)


def test_whose_standard_deviation_divides():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    # group: sqrt(2 * 0.25 / 1) = 0.707107, 0.5 / 0.707207 = 0.707007; the second group has no variance
    expected = torch.tensor([[0.707007, -0.707007], [0.0, 0.0]])
    torch.testing.assert_close(on_policy_advantages(rewards, "group"), expected, rtol=0, atol=1e-6)
    # batch: mean 0.25, std = sqrt((0.5625 + 3 * 0.0625) / 3) = 0.5, 0.5 / 0.5001 = 0.999800
    expected = torch.tensor([[0.9998, -0.9998], [0.0, 0.0]])
    torch.testing.assert_close(on_policy_advantages(rewards, "batch"), expected, rtol=0, atol=1e-6)
    assert on_policy_advantages(rewards, "none").tolist() == [[0.5, -0.5], [0.0, 0.0]]


def test_rows_without_a_reward_are_left_out():
    rewards = torch.tensor([[1.0, NAN, 0.0, NAN], [NAN, NAN, NAN, NAN], [3.0, NAN, NAN, NAN]])
    # first group as if it had two rows: mean 0.5, std 0.707107; the others have nothing to compare
    expected = torch.tensor([[0.707007, 0.0, -0.707007, 0.0], [0.0] * 4, [0.0] * 4])
    torch.testing.assert_close(on_policy_advantages(rewards), expected, rtol=0, atol=1e-6)
    two_rows = on_policy_advantages(torch.tensor([[1.0, 0.0]]))
    assert torch.equal(on_policy_advantages(rewards)[0, [0, 2]], two_rows[0])
    assert on_policy_advantages(rewards, "none").tolist() == [[0.5, 0.0, -0.5, 0.0], [0.0] * 4, [0.0] * 4]
    # batch: over the scored 1, 0, 3: mean 4/3, std = sqrt((1/9 + 16/9 + 25/9) / 2) = 1.527525
    assert on_policy_advantages(rewards, "batch")[0, 0].item() == pytest.approx(0.5 / (1.527525 + 1e-4))


def test_without_nan_the_standard_deviation_is_torchs():
    values = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(nanstd(values, dim=1), values.std(dim=1))
    torch.testing.assert_close(nanstd(values, dim=0, keepdim=True), values.std(dim=0, keepdim=True))
    with_gaps = values.masked_fill(torch.rand(5, 7) < 0.3, NAN)
    for row, std in zip(with_gaps, nanstd(with_gaps, dim=1), strict=True):
        torch.testing.assert_close(std, row[~row.isnan()].std())


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_on_policy_advantages_are_those_of_trl(scale_rewards):
    """The lines of GRPOTrainer._generate_and_score_completions, with TRL's own standard deviation, rewards missing here and there."""
    rewards = torch.randn(40, 5).masked_fill(torch.rand(40, 5) < 0.4, NAN)
    rewards[0], rewards[1] = 0.7, NAN  # a group without variance, and one without rewards
    std = {
        "group": trl_utils.nanstd(rewards, dim=1, keepdim=True) + 1e-4,
        "batch": trl_utils.nanstd(rewards) + 1e-4,
        "none": 1.0,
    }
    expected = ((rewards - rewards.nanmean(1, keepdim=True)) / std[scale_rewards]).nan_to_num(nan=0.0)
    assert expected.any()
    torch.testing.assert_close(on_policy_advantages(rewards, scale_rewards), expected, rtol=1e-5, atol=1e-6)


def test_order_inside_a_group_does_not_matter():
    rewards, order = torch.randn(3, 6, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(on_policy_advantages(rewards[:, order]), on_policy_advantages(rewards)[:, order])


def test_guided_worked_numbers():
    on_policy = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    guided = torch.tensor([[1.0, 0.0, 0.75], [1.0, 0.0, NAN]])
    # first group: mean_on 0.25; 0.5 * (1 - 0.25) / 1 = 0.375; failed: 0; 0.5 * 0.5 = 0.25. Second: mean_on 1, nothing exceeds it
    assert guided_advantages(guided, on_policy, 0.5, 1.0).tolist() == [[0.375, 0.0, 0.25], [0.0, 0.0, 0.0]]
    # a reward that spans 2 counts half
    assert guided_advantages(guided, on_policy, 0.5, 2.0)[0].tolist() == [0.1875, 0.0, 0.125]
    assert not guided_advantages(guided, on_policy, 0.0, 1.0).any()


def test_guided_rows_never_move_the_baseline():
    on_policy, guided = torch.rand(4, 5), torch.rand(4, 3)
    before = guided_advantages(guided, on_policy, 1.0, 1.0)
    changed = guided.clone()
    changed[:, 1:] = 100.0
    after = guided_advantages(changed, on_policy, 1.0, 1.0)
    assert torch.equal(before[:, 0], after[:, 0])
    # and a guided row of the on-policy mean, or below, is ignored
    assert not guided_advantages(on_policy.mean(1, keepdim=True) - 1e-6, on_policy, 1.0, 1.0).any()


def test_a_failed_guided_row_is_ignored_and_not_punished():
    rewards, on_policy = torch.rand(50, 4), torch.rand(50, 8)
    advantages = guided_advantages(rewards, on_policy, 0.7, 1.0)
    failed = rewards <= on_policy.mean(1, keepdim=True)
    assert not advantages[failed].any()
    assert (advantages[~failed] > 0).all()
    assert advantages.max() <= 0.7


def test_a_baseline_of_scored_rows_only():
    # mean_on over 0 and 1 is 0.5
    assert guided_advantages(torch.tensor([[1.0]]), torch.tensor([[0.0, NAN, 1.0]]), 1.0, 1.0).tolist() == [[0.5]]
    assert guided_advantages(torch.tensor([[1.0]]), torch.tensor([[NAN, NAN]]), 1.0, 1.0).tolist() == [[0.0]]


def test_total_reward_sums_what_was_scored():
    rewards = torch.tensor([[1.0, 3.0], [1.0, NAN], [NAN, NAN], [NAN, 3.0], [0.0, 0.0]])
    # 2 * 1 + 0.5 * 3; 2 * 1; none; 0.5 * 3; 0
    total = total_reward(rewards, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(total, torch.tensor([3.5, 2.0, NAN, 1.5, 0.0]), equal_nan=True)


def test_the_span_counts_the_functions_that_scored_a_row():
    scored_by_first, by_both, by_none = [0.0, NAN], [1.0, 1.0], [NAN, NAN]
    span = reward_span(torch.tensor([scored_by_first, by_both, by_none]), torch.tensor([1.0, -0.5]))
    assert span.tolist() == [1.0, 1.5, 0.0]


def test_each_row_may_have_its_own_range():
    rewards, on_policy = torch.ones(1, 3), torch.zeros(1, 2)
    spans = torch.tensor([[1.0, 2.0, 0.0]])  # the last one was scored by no function: nothing to gain
    assert guided_advantages(rewards * torch.tensor([1.0, 1.0, NAN]), on_policy, 1.0, spans).tolist() == [
        [1.0, 0.5, 0.0]
    ]
