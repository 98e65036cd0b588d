"""What a reward is worth, which rollouts are right, and what is said of rewards that do not fit."""

import math

import pytest
import torch

from trl_selective.reward_scale import RewardScale

NAN = math.nan
FORMAT_AND_ANSWER = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, NAN], [NAN, NAN]])  # two groups of two


def scale(weights=(1.0, 2.0), num_generations=2, names=("format", "answer"), **settings) -> RewardScale:
    return RewardScale(list(names), torch.tensor(weights), num_generations, **settings)


def test_totals_are_weighted_sums_by_group():
    totals = scale().totals(FORMAT_AND_ANSWER)
    # 1 * 1 + 2 * 0, 1 * 1 + 2 * 1; 1 * 0 of a function alone, and nothing
    assert totals.nan_to_num(nan=-1.0).tolist() == [[1.0, 3.0], [0.0, -1.0]]


def test_the_span_is_that_of_the_functions_that_scored_a_group():
    # |1| + |2| where both scored; the second group has the first function alone, until an injected row is scored by the other, too.
    assert scale().span(FORMAT_AND_ANSWER).tolist() == [[3.0], [1.0]]
    injected = FORMAT_AND_ANSWER.clone()
    injected[3] = torch.tensor([NAN, 1.0])
    assert scale().span(FORMAT_AND_ANSWER, injected).tolist() == [[3.0], [3.0]]
    assert scale(weights=(1.0, -2.0)).span(injected).tolist() == [[3.0], [3.0]]


def test_the_users_range_is_that_of_all_groups():
    assert scale(reward_range=4.0).span(FORMAT_AND_ANSWER).tolist() == [[4.0], [4.0]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[False, True], [False, False]]),  # 1 and 3 of 3; 0 of 1 and nothing
        ({"reward_range": 8.0}, [[False, False], [False, False]]),
        ({"correctness_reward": "format"}, [[True, True], [False, False]]),
        ({"correctness_reward": "answer"}, [[False, True], [False, False]]),
    ],
)
def test_which_rows_are_right(settings, expected):
    own = scale(**settings)
    assert own.is_correct(FORMAT_AND_ANSWER, own.span(FORMAT_AND_ANSWER)).tolist() == expected


def test_rows_by_themselves_have_the_span_of_their_group():
    """As expert completions have: the first of three, and one of one."""
    rows = torch.tensor([[1.0, 0.0], [1.0, NAN]])
    assert scale().is_correct(rows, torch.tensor([[3.0], [1.0]])).tolist() == [[False], [True]]


def problems(rewards, divides=True, **settings) -> dict[str, str]:
    own, given = scale(**settings), torch.tensor(rewards)
    verdicts = own.is_correct(given, own.span(given))
    return own.problems(given, own.totals(given), verdicts, divides=divides)


def test_rewards_that_fit():
    assert problems([[0.0, 1.0], [1.0, NAN]]) == {}
    assert problems([[0.0, 10.0], [1.0, 0.0]], reward_range=21.0) == {}  # 1 * 0 + 2 * 10, as much as may be
    assert problems([[0.0, 1.0 + 1e-6], [-1e-6, 0.0]]) == {}  # rounding


def test_rewards_beyond_the_unit():
    (message,) = problems([[0.0, 10.0], [0.0, 0.0]]).values()
    assert message.startswith("Reward function 'answer' gives 10, but with reward_range unset")
    assert problems([[0.0, 10.0], [0.0, 0.0]], weights=(1.0, 0.0)) == {}  # which does not count
    for beyond in (-0.5, 1.5):
        assert set(problems([[beyond, 0.0], [0.0, 0.0]])) == {"reward_range"}


def test_a_function_that_decides_makes_the_range_a_matter_of_advantages():
    rewards = [[0.0, 10.0], [0.0, 0.0]]
    assert set(problems(rewards, correctness_reward="format")) == {"reward_range"}
    assert problems(rewards, divides=False, correctness_reward="format") == {}
    assert set(problems(rewards, divides=False)) == {"reward_range"}


def test_rewards_beyond_the_users_range():
    assert set(problems([[0.0, 2.0], [0.0, 0.0]], reward_range=3.0)) == {"reward_range"}
    assert set(problems([[-0.1, 0.0], [0.0, 0.0]], reward_range=3.0)) == {"reward_range"}
    assert problems([[3.0, 0.0], [0.0, 0.0]], reward_range=3.0) == {}
    assert problems([[0.0, 2.0], [0.0, 0.0]], reward_range=3.0, correctness_reward="answer") == {}


def test_rollouts_that_are_all_right():
    """Each has the weight 2 of the format: more than half of 3."""
    rewards, weights = [[1.0, 0.0], [1.0, 1.0]], (2.0, 1.0)
    assert set(problems(rewards, weights=weights)) == {"correctness_reward"}
    assert set(problems([*rewards, [NAN, NAN], [NAN, NAN]], weights=weights)) == {
        "correctness_reward"
    }  # nobody scored these
    assert problems(rewards, weights=weights, correctness_reward="answer") == {}
    assert problems([[1.0, 1.0], [1.0, 1.0]], weights=weights) == {}  # they may well be
    assert problems([[0.7], [1.0]], weights=(1.0,), names=["answer"]) == {}  # there is no other function


def test_a_negative_weight_may_put_half_of_the_span_out_of_reach():
    """Of 1 and -1 the span is 2, and 1 - 1 is not above 1; of 1 and -0.25, 0.75 is above 0.625."""
    rewards, weights = [[1.0, 0.0], [0.0, 1.0]], (1.0, -1.0)
    (message,) = problems(rewards, weights=weights).values()
    assert "may have no more than 0 though it is right: it counts as correct above half of reward_range, 1." in message
    assert problems(rewards, weights=weights, correctness_reward="format") == {}
    assert problems(rewards, weights=(1.0, -0.25)) == {}
    assert set(problems(rewards, weights=(1.0, -0.25), reward_range=1.6)) == {"reward_range", "correctness_reward"}


def test_two_functions_of_one_name_cannot_be_told_apart():
    with pytest.raises(ValueError, match="correctness_reward='reward' is the name of 2 reward functions"):
        scale(names=["reward", "reward"], correctness_reward="reward")


def test_a_function_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"must be one of the reward functions \['format', 'answer'\], got 'accuracy'"
    ):
        scale(correctness_reward="accuracy")
