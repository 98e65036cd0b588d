"""Which rows of a batch are guided, and what their tokens weigh."""

import math

import pytest
import torch

from trl_selective.experts import ExpertCompletion
from trl_selective.guided_batch import GuidedBatch
from trl_selective.injection import Choice, Injection
from trl_selective.rollout import GuidedRollout


def make_batch(num_generations=4, num_guided=2, num_rows=8, **fields) -> GuidedBatch:
    return GuidedBatch(
        coef=1.0,
        entropy_threshold=1.0,
        num_generations=num_generations,
        num_guided=num_guided,
        num_rows=num_rows,
        **fields,
    )


def record(log_ratios: list[list[float]], drawn: list[list[bool]] | None = None) -> GuidedRollout:
    """Rows with these values of log pi - log pi_mix."""
    return GuidedRollout(
        completion_ids=[[2] * len(row) for row in log_ratios],
        sampling_per_token_logps=[[-5.0] * len(row) for row in log_ratios],
        policy_per_token_logps=[[-5.0 + ratio for ratio in row] for row in log_ratios],
        guidance_weights=[[0.5] * len(row) for row in log_ratios],
        entropies=[[1.0] * len(row) for row in log_ratios],
        expert_drawn=drawn or [[False] * len(row) for row in log_ratios],
        policy_forwards=0,
        expert_forwards=0,
    )


def test_the_last_rows_of_each_group_are_guided():
    batch = make_batch(num_generations=3, num_guided=1, num_rows=6)
    assert batch.num_on_policy == 2
    assert batch.is_guided == [False, False, True, False, False, True]
    assert batch.split(list("abcdef")) == (["a", "b", "d", "e"], ["c", "f"])
    assert batch.merge([1, 2, 3, 4], [10, 20]) == [1, 2, 10, 3, 4, 20]


@pytest.mark.parametrize("num_generations", [2, 3, 8])
def test_merge_inverts_split(num_generations):
    for num_guided in range(num_generations + 1):
        batch = make_batch(num_generations, num_guided, 5 * num_generations)
        rows = list(range(batch.num_rows))
        on_policy, guided = batch.split(rows)
        assert len(guided) == 5 * num_guided
        assert batch.merge(on_policy, guided) == rows
        assert batch.split(batch.merge(on_policy, guided)) == (on_policy, guided)


def test_a_list_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="longer than"):
        make_batch().split([1, 2, 3])


def test_a_group_is_not_split_over_processes():
    with pytest.raises(AssertionError, match="a group is split over processes"):
        make_batch(num_generations=4, num_rows=6)


def test_shares_of_the_expert():
    drawn = [[True, False, False, False], [True, True], [False], [True, False]]
    batch = make_batch(rollout=record([[0.0] * len(row) for row in drawn], drawn))
    assert batch.expert_drawn_shares() == [0.0, 0.0, 0.25, 1.0, 0.0, 0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        # a group of two on-policy rows and two guided ones with ratios (2, 1/2, 4) and (8), padded to 4 tokens
        ("token_truncate", [[1, 1, 1, 1], [1, 1, 1, 1], [2, 0.5, 3, 1], [3, 1, 1, 1]]),
        ("token_mask", [[1, 1, 1, 1], [1, 1, 1, 1], [2, 0.5, 0, 1], [0, 1, 1, 1]]),
        # one weight per row: 2 * 1/2 * 4 = 4 and 8, both above 3
        ("sequence_truncate", [[1], [1], [3], [3]]),
        ("sequence_mask", [[1], [1], [0], [0]]),
    ],
)
def test_weights_are_those_of_guided_tokens_and_1_elsewhere(correction, expected):
    ratios = [[math.log(2), math.log(0.5), math.log(4)], [math.log(8)]]
    batch = make_batch(num_rows=4, rollout=record(ratios))
    weights = batch.importance_weights(4, correction, 3.0)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_without_truncation_a_sequence_weighs_the_product():
    ratios = [[math.log(2), math.log(0.5), math.log(4)], [math.log(8)]]
    batch = make_batch(num_rows=4, rollout=record(ratios))
    weights = batch.importance_weights(3, "sequence_truncate", math.inf)
    torch.testing.assert_close(weights, torch.tensor([[1.0], [1.0], [4.0], [8.0]]))


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_a_level_below_1_leaves_on_policy_rows_alone(correction):
    batch = make_batch(num_rows=4, rollout=record([[0.0, 0.0], [0.0]]))
    assert (batch.importance_weights(3, correction, 0.5)[:2] == 1).all()


def test_padding_further_changes_no_weight():
    batch = make_batch(rollout=record([torch.randn(n).tolist() for n in (3, 1, 5, 2)]))
    for correction in ("token_truncate", "token_mask"):
        tight, wide = (batch.importance_weights(seq, correction, 1.5) for seq in (5, 9))
        assert torch.equal(wide[:, :5], tight)
        assert (wide[:, 5:] == 1).all()
    for correction in ("sequence_truncate", "sequence_mask"):
        tight, wide = (batch.importance_weights(seq, correction, 1.5) for seq in (5, 9))
        assert torch.equal(wide, tight)


def test_a_row_that_an_expert_completion_replaced_may_be_longer_than_all_that_stay():
    batch = make_batch(num_rows=4, rollout=record([[math.log(2)] * 5, [math.log(2)]]))
    weights = batch.importance_weights(2, "token_truncate", math.inf)
    torch.testing.assert_close(weights[[0, 1, 3]], torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))


def test_each_process_finds_its_own_injected_rows():
    rows = [3, 7, 8, None, 21]
    choices = [Choice(0, ExpertCompletion((2, 1)), "first", float(row or 0), [], row=row) for row in rows]
    injection = Injection(choices, effects=[], fired={}, num_read=5, num_overlong=0)
    batch = make_batch(num_generations=4, num_rows=8, injection=injection)
    # 8 rows each: 3 and 7 of the first process, 8 of the second, 21 of the third; one choice stays out
    found = [batch.injected(process_index) for process_index in range(4)]
    assert found == [{3: choices[0], 7: choices[1]}, {0: choices[2]}, {5: choices[4]}, {}]


def test_rewards_of_injected_completions_take_the_places_of_those_that_they_replace():
    sampled = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    batch = make_batch(sampled_rewards_per_func=sampled.clone())
    choices = [Choice(0, ExpertCompletion((2,)), "first", 0.0, [2.0, 3.0], row=row) for row in (1, None)]
    batch.inject(Injection(choices, effects=[], fired={}, num_read=2, num_overlong=0))
    torch.testing.assert_close(batch.rewards_per_func, torch.tensor([[0.0, 1.0], [2.0, 3.0], [1.0, 0.0]]))
    torch.testing.assert_close(batch.sampled_rewards_per_func, sampled)


def test_before_anything_is_injected_there_are_no_injected_rows():
    assert make_batch().injected(0) == {}
    assert make_batch(injection=Injection([], [], {}, 0, 0)).injected(0) == {}
