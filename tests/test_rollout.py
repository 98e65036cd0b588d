"""The record is checked where it is made."""

import math

import pytest
import torch

from trl_selective.rollout import GuidedRollout


def rollout(**changes) -> GuidedRollout:
    fields = {
        "completion_ids": [[3, 4, 1], [5]],
        "sampling_per_token_logps": [[-1.0, -0.5, -0.25], [0.0]],
        "policy_per_token_logps": [[-1.5, -0.25, -0.25], [-80.0]],
        "guidance_weights": [[0.5, 0.0, 1.0], [1.0]],
        "entropies": [[1.0, 0.0, 2.0], [0.5]],
        "expert_drawn": [[True, False, False], [True]],
        "policy_forwards": 4,
        "expert_forwards": 4,
        **changes,
    }
    return GuidedRollout(**fields)


def test_a_valid_record():
    record = rollout()
    assert record.num_tokens == 4
    assert record.num_drafted == 0
    # log pi - log pi_mix
    assert [row.tolist() for row in record.log_ratios()] == [[-0.5, 0.25, 0.0], [-80.0]]
    assert {row.dtype for row in record.log_ratios()} == {torch.float64}


@pytest.mark.parametrize(
    "field",
    ["sampling_per_token_logps", "policy_per_token_logps", "guidance_weights", "entropies", "expert_drawn"],
)
def test_fields_must_agree_in_length(field):
    rows = getattr(rollout(), field)
    message = rf"{field} must have one entry per token of completion_ids, got rows of \[2, 1\], expected \[3, 1\]"
    with pytest.raises(ValueError, match=message):
        rollout(**{field: [rows[0][:2], rows[1]]})
    with pytest.raises(ValueError, match=rf"{field} must have .* got rows of \[3\], expected \[3, 1\]"):
        rollout(**{field: rows[:1]})


def test_a_row_has_a_token():
    empty = {name: [value[0], []] for name, value in vars(rollout()).items() if isinstance(value, list)}
    with pytest.raises(ValueError, match="Row 1 is empty: a completion has at least one token"):
        rollout(**empty)


@pytest.mark.parametrize("logp", [math.nan, math.inf, -math.inf, 0.1])
def test_a_log_probability_is_one(logp):
    message = rf"Row 0, token 1 has log pi_mix = {logp} and guidance weight w = 0.0, .*Look for NaN or inf"
    with pytest.raises(ValueError, match=message):
        rollout(sampling_per_token_logps=[[-1.0, logp, -0.25], [0.0]])


def test_a_log_probability_may_round_to_just_above_0():
    assert rollout(sampling_per_token_logps=[[-1.0, 5e-7, -0.25], [0.0]]).num_tokens == 4


@pytest.mark.parametrize("weight", [math.nan, -0.1, 1.1])
def test_a_weight_lies_in_0_to_1(weight):
    with pytest.raises(ValueError, match=rf"Row 1, token 0 has log pi_mix = 0.0 and guidance weight w = {weight}"):
        rollout(guidance_weights=[[0.5, 0.0, 1.0], [weight]])


def test_a_record_that_is_not_scored_is_checked_by_the_policy():
    unknown = {"sampling_per_token_logps": [[math.nan] * 3, [math.nan]], "is_scored": False}
    assert rollout(**unknown).num_tokens == 4
    with pytest.raises(ValueError, match="Row 1, token 0 has log pi_theta = nan"):
        rollout(**unknown, policy_per_token_logps=[[-1.5, -0.25, -0.25], [math.nan]])
    with pytest.raises(ValueError, match="Row 0, token 0 has log pi_mix = nan"):
        rollout(sampling_per_token_logps=[[math.nan] * 3, [math.nan]])
