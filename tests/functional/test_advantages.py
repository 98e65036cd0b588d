"""Eq. 10 and 11 of arXiv:2510.04140 in numbers, with rewards that are missing."""

import pytest
import torch
from trl.trainer import utils as trl_utils

from trl_selective.functional import (
    guided_advantages,
    is_correct,
    mixed_group_advantages,
    on_policy_advantages,
    reward_span,
    total_reward,
)
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


def test_fewer_than_two_values_have_no_standard_deviation():
    values = torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan]])
    assert nanstd(values, dim=1).isnan().all()
    assert nanstd(torch.zeros(2, 0), dim=1).isnan().all()


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


def test_the_span_counts_the_functions_that_scored_a_row_of_the_group():
    by_first, by_both, by_none = [0.0, NAN], [1.0, 1.0], [NAN, NAN]
    groups = torch.tensor([[by_first, by_none], [by_first, by_both], [by_none, by_none]])
    span = reward_span(groups, torch.tensor([1.0, -0.5]))
    assert span.tolist() == [
        [1.0],
        [1.5],
        [0.0],
    ]  # of all rows of a group, also of those that the second did not score


def right(rewards_per_func, weights, reward_range, deciding=None) -> torch.Tensor:
    """Of rows that are a group each."""
    decision = None if deciding is None else rewards_per_func[:, [deciding]]
    ranges = torch.as_tensor(reward_range).reshape(-1, 1).expand(len(rewards_per_func), 1)
    return is_correct(total_reward(rewards_per_func, weights).unsqueeze(1), ranges, decision).squeeze(1)


def test_right_is_what_has_more_than_half_of_its_own_span():
    rewards = torch.tensor([[0.6, NAN], [0.6, 0.0], [0.5, NAN], [0.4, 0.2], [NAN, NAN], [0.2, 0.9]])
    # totals 0.6, 0.6, 0.5, 0.6, none, 1.1
    assert right(rewards, torch.ones(2), reward_range=1.0).tolist() == [True, True, False, True, False, True]
    ranges = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert right(rewards, torch.ones(2), ranges).tolist() == [True, False, False, False, False, True]


def test_right_is_what_the_deciding_function_says():
    """Of accuracy, and two formats that are always there, accuracy decides: also without a weight, and where another gives nothing."""
    rewards = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.5, 1.0, 1.0], [1.0, NAN, NAN]])
    for weights in (torch.ones(3), torch.tensor([0.0, 1.0, 1.0])):
        assert right(rewards, weights, 3.0, deciding=0).tolist() == [False, True, False, True]
    assert right(rewards, torch.ones(3), 3.0).tolist() == [True, False, True, False]  # by the total


def test_where_the_deciding_function_says_nothing_the_total_decides():
    """Rows of another task, which has a function of its own."""
    rewards = torch.tensor([[NAN, 0.9], [NAN, 0.4], [NAN, NAN]])
    assert right(rewards, torch.ones(2), 1.0, deciding=0).tolist() == [True, False, False]


def test_each_row_may_have_its_own_range():
    rewards, on_policy = torch.ones(1, 3), torch.zeros(1, 2)
    spans = torch.tensor([[1.0, 2.0, 0.0]])  # the last one was scored by no function: nothing to gain
    assert guided_advantages(rewards * torch.tensor([1.0, 1.0, NAN]), on_policy, 1.0, spans).tolist() == [
        [1.0, 0.5, 0.0]
    ]


# ---- Groups with guided and injected rows ----------------------------------------------------------------------------------------------

SCALES = ["group", "batch", "none"]
MODES = ["positive_excess", "group"]
NOBODY = torch.zeros(20, 6, dtype=torch.bool)
LAST_TWO = torch.arange(6).expand(20, 6) >= 4


def random_rewards() -> torch.Tensor:
    """20 groups of 6, some without a reward here and there, one without any, one without variance."""
    rewards = torch.rand(20, 6, dtype=torch.float64).masked_fill(torch.rand(20, 6) < 0.15, NAN)
    rewards[0], rewards[1] = NAN, 0.25
    return rewards


def random_injection(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of which some were replaced, and which. Half of the groups have none replaced."""
    is_injected = torch.rand(20, 6) < 0.3
    is_injected[::2] = False
    return torch.where(is_injected, torch.rand(20, 6, dtype=torch.float64), rewards), is_injected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_without_guided_and_injected_rows_it_is_plain_grpo(scale_rewards, mode):
    rewards = random_rewards()
    advantages = mixed_group_advantages(
        rewards, rewards, NOBODY, NOBODY, 0.5, 1.0, scale_rewards=scale_rewards, injection_advantage=mode
    )
    assert torch.equal(advantages, on_policy_advantages(rewards, scale_rewards))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_with_guided_rows_alone_it_is_eq_10_and_11(scale_rewards, mode):
    rewards, reward_range = random_rewards(), 0.5 + torch.rand(20, 6, dtype=torch.float64)
    advantages = mixed_group_advantages(
        rewards, rewards, LAST_TWO, NOBODY, 0.5, reward_range, scale_rewards=scale_rewards, injection_advantage=mode
    )
    own, guided = rewards[:, :4], rewards[:, 4:]
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(advantages[:, :4], on_policy_advantages(own, scale_rewards), **close)
    torch.testing.assert_close(advantages[:, 4:], guided_advantages(guided, own, 0.5, reward_range[:, 4:]), **close)
    assert advantages[:, 4:].any()


@pytest.mark.parametrize("is_guided", [NOBODY, LAST_TWO], ids=["injected", "injected_and_guided"])
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_rows_that_stay_keep_their_advantage_when_others_are_replaced(scale_rewards, is_guided):
    sampled = random_rewards()
    rewards, is_injected = random_injection(sampled)
    with_injection, without = (
        mixed_group_advantages(sampled, now, is_guided, replaced, 0.5, 1.0, scale_rewards=scale_rewards)
        for now, replaced in ((rewards, is_injected), (sampled, NOBODY))
    )
    assert torch.equal(with_injection[~is_injected], without[~is_injected])
    # and an injected row counts by its positive excess over the baseline as it was sampled
    excess = rewards - sampled.masked_fill(is_guided, NAN).nanmean(1, keepdim=True)
    expected = (0.5 * excess.clamp(min=0)).nan_to_num(nan=0.0)
    torch.testing.assert_close(with_injection[is_injected], expected[is_injected])
    assert with_injection[is_injected].any()


def test_positive_excess_in_numbers():
    # The policy's own rollouts got 0, 0, 1, the guided one 1. The third and the guided one make room for completions with rewards 1 and 0.
    sampled, rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    is_guided, is_injected = torch.tensor([[False, False, False, True]]), torch.tensor([[False, False, True, True]])
    # mean_on = 1/3 over all three, the replaced one included; 0.5 (1 - 1/3) / 2 = 1/6; the failed one is ignored
    advantages = mixed_group_advantages(sampled, rewards, is_guided, is_injected, 0.5, 2.0, scale_rewards="none")
    torch.testing.assert_close(advantages, torch.tensor([[-1 / 3, -1 / 3, 1 / 6, 0.0]]))


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_inside_the_group_it_is_plain_grpo_over_the_rows_that_are_there_now(scale_rewards):
    sampled = random_rewards()
    rewards, is_injected = random_injection(sampled)
    advantages = mixed_group_advantages(
        sampled, rewards, NOBODY, is_injected, 0.5, 1.0, scale_rewards=scale_rewards, injection_advantage="group"
    )
    now, before = on_policy_advantages(rewards, scale_rewards), on_policy_advantages(sampled, scale_rewards)
    has_injected = is_injected.any(1)
    expected = torch.where(has_injected[:, None], now, before)
    expected[is_injected] *= 0.5  # alpha
    assert torch.equal(advantages, expected)
    assert (now - before)[has_injected].abs().max() > 0.1
    # With alpha = 1 and one injected row in each group it is what LUFFY computes.
    is_injected = torch.arange(6).expand(20, 6) == 5
    rewards = torch.where(is_injected, 1.0, sampled)
    luffy = mixed_group_advantages(
        sampled, rewards, NOBODY, is_injected, 1.0, 1.0, scale_rewards=scale_rewards, injection_advantage="group"
    )
    assert torch.equal(luffy, on_policy_advantages(rewards, scale_rewards))


def test_inside_the_group_in_numbers():
    sampled, rewards = (
        torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
    )
    is_injected = torch.tensor([[False, False, True], [False, False, False]])
    advantages = mixed_group_advantages(
        sampled,
        rewards,
        torch.zeros_like(is_injected),
        is_injected,
        0.5,
        1.0,
        scale_rewards="none",
        injection_advantage="group",
    )
    # mean 1/3: -1/3, -1/3, and 0.5 * 2/3 for the injected row; the other group has nothing injected, and nothing halved
    torch.testing.assert_close(advantages, torch.tensor([[-1 / 3, -1 / 3, 1 / 3], [-1 / 3, 2 / 3, -1 / 3]]))


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_inside_the_group_guided_rows_stay_apart(scale_rewards):
    """They move no baseline, neither that of the rows that stay nor that of injected ones; a guided row that was replaced is injected."""
    sampled = random_rewards()
    rewards, is_injected = random_injection(sampled)
    rewards[3, 5], is_injected[3, 5] = 0.9, True
    options = {"scale_rewards": scale_rewards, "injection_advantage": "group"}
    advantages = mixed_group_advantages(sampled, rewards, LAST_TWO, is_injected, 0.5, 1.0, **options)
    guided = LAST_TWO & ~is_injected
    as_if_unscored = on_policy_advantages(rewards.masked_fill(guided, NAN), scale_rewards)
    rows = is_injected.any(1, keepdim=True) & ~guided
    torch.testing.assert_close(advantages[rows & ~is_injected], as_if_unscored[rows & ~is_injected])
    torch.testing.assert_close(advantages[is_injected], 0.5 * as_if_unscored[is_injected])
    apart = mixed_group_advantages(sampled, sampled, LAST_TWO, NOBODY, 0.5, 1.0, **options)
    assert torch.equal(advantages[guided], apart[guided])


def test_a_failed_injected_row_is_ignored_or_punished():
    sampled = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    rewards, is_injected = torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[False, False, False, True]])
    ignored, punished = (
        mixed_group_advantages(sampled, rewards, NOBODY[:1, :4], is_injected, 1.0, 1.0, injection_advantage=mode)
        for mode in MODES
    )
    assert ignored[0, 3] == 0
    assert punished[0, 3].item() == pytest.approx(-0.865875, abs=1e-6)  # -0.5 / (0.577350 + 0.0001)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_order_inside_a_mixed_group_does_not_matter(scale_rewards, mode):
    sampled = random_rewards()
    rewards, is_injected = random_injection(sampled)
    is_guided, reward_range = torch.rand(20, 6) < 0.3, 0.5 + torch.rand(20, 6, dtype=torch.float64)
    options = {"scale_rewards": scale_rewards, "injection_advantage": mode}
    order = torch.randperm(6)
    straight = mixed_group_advantages(sampled, rewards, is_guided, is_injected, 0.5, reward_range, **options)
    inputs = [values[:, order] for values in (sampled, rewards, is_guided, is_injected)]
    permuted = mixed_group_advantages(*inputs, 0.5, reward_range[:, order], **options)
    torch.testing.assert_close(permuted, straight[:, order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_groups_know_nothing_of_each_other(scale_rewards, mode):
    sampled = random_rewards()
    rewards, is_injected = random_injection(sampled)
    options = {"scale_rewards": scale_rewards, "injection_advantage": mode}
    together = mixed_group_advantages(sampled, rewards, LAST_TWO, is_injected, 0.5, 1.0, **options)
    for group in range(20):
        own = slice(group, group + 1)
        alone = mixed_group_advantages(
            sampled[own], rewards[own], LAST_TWO[own], is_injected[own], 0.5, 1.0, **options
        )
        assert torch.equal(together[own], alone)
    without = mixed_group_advantages(sampled, sampled, LAST_TWO, NOBODY, 0.5, 1.0, **options)
    untouched = ~is_injected.any(1)
    assert torch.equal(together[untouched], without[untouched])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale_rewards", SCALES)
def test_a_row_without_a_reward_has_no_advantage_in_a_mixed_group(scale_rewards, mode):
    sampled = random_rewards()
    rewards, is_injected = random_injection(sampled)
    rewards[is_injected & (torch.rand(20, 6) < 0.3)] = NAN
    advantages = mixed_group_advantages(
        sampled, rewards, LAST_TWO, is_injected, 0.5, 1.0, scale_rewards=scale_rewards, injection_advantage=mode
    )
    assert rewards.isnan()[is_injected].any()
    assert advantages.isfinite().all()
    assert not advantages[rewards.isnan()].any()


@pytest.mark.parametrize("mode", MODES)
def test_alpha_0_leaves_injected_rows_without_effect_of_their_own(mode):
    sampled = random_rewards()
    rewards, is_injected = random_injection(sampled)
    advantages = mixed_group_advantages(sampled, rewards, NOBODY, is_injected, 0.0, 1.0, injection_advantage=mode)
    assert not advantages[is_injected].any()
    assert advantages[~is_injected].any()
