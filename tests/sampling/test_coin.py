"""The coins decide when the expert reads: at heads, and where a row ends whose tokens are not all accounted for. (Its law: test_law.py.)"""

import pytest
import torch

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded
from trl_selective.sampling import coin, live_rows
from trl_selective.sampling.draw import ACCEPT

LENGTH = 40
WEIGHT = 0.15


@pytest.fixture
def models():
    return tiny_model(1), tiny_model(2)


@pytest.fixture
def heads(monkeypatch):
    """(rows, positions) where a coin of weight `WEIGHT` shows heads."""
    noise = torch.rand(len(PROMPTS), LENGTH, 3, dtype=torch.float64)
    monkeypatch.setattr(live_rows, "position_noise", lambda rows, positions, device: noise[:rows, :positions])
    return noise[:, :, ACCEPT] < WEIGHT


@pytest.fixture
def blocks(models):
    """Shapes of what the expert reads."""
    shapes = []
    models[1].register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_expert_reads_where_a_coin_shows_heads(models, heads, blocks, num_rows):
    prompts = PROMPTS[:num_rows]
    guidance = Guidance("constant", max_weight=WEIGHT)
    rollout = guidance.sample("coin", *models, prompts, length=LENGTH)
    columns = [columns for _, columns in blocks[1:]]
    assert_recorded(rollout, *models, prompts, guidance)
    steps = heads[:num_rows].any(0)
    assert 0 < steps.sum() < LENGTH / 2
    reads = steps.sum() + (not steps[-1])  # at the end, log pi_mix of the last tokens is still owed
    assert rollout.expert_forwards == num_rows * reads
    assert rollout.policy_forwards == num_rows * LENGTH
    assert rollout.num_drafted == 0
    # After the prompts, each token is read once, in blocks that end with a head.
    ends = steps.nonzero().squeeze(1) + 1
    assert sum(columns) == LENGTH
    assert columns[: len(ends)] == ends.diff(prepend=torch.tensor([0])).tolist()


def test_an_expert_without_weight_reads_only_the_prompts(models, blocks):
    rollout = Guidance("constant", max_weight=0.0).sample("coin", *models, PROMPTS * 2, length=LENGTH, eos={1})
    assert blocks == [(len(PROMPTS), len(PROMPTS[0]) - 1)]
    assert rollout.expert_forwards == 0
    assert rollout.sampling_per_token_logps == rollout.policy_per_token_logps


def test_what_a_row_is_owed_is_paid_before_it_leaves(models, blocks):
    """Rows end in the middle of blocks; those that stay keep their backlog in order."""
    guidance = Guidance("constant", max_weight=0.05)
    rollout = guidance.sample("coin", *models, PROMPTS * 6, length=LENGTH, eos={1})
    assert len(set(map(len, rollout.completion_ids))) > 4
    assert any(columns > 2 for _, columns in blocks[1:])
    assert_recorded(rollout, *models, PROMPTS * 6, guidance)


def test_the_expert_falls_behind_by_a_few_tokens_only(models, blocks, monkeypatch):
    """Its logits for all that it is owed are held at once: with a large vocabulary these are gigabytes."""
    monkeypatch.setattr(coin, "MAX_BACKLOG", 7)
    guidance = Guidance("constant", max_weight=1e-9)
    rollout = guidance.sample("coin", *models, PROMPTS, length=LENGTH)
    assert [columns for _, columns in blocks[1:]] == [8, 8, 8, 8, 8]
    assert_recorded(rollout, *models, PROMPTS, guidance)


def test_what_only_some_rows_are_owed_is_paid(models):
    """A gate that is shut in one row and open in the other."""
    guidance = Guidance("hard_gate", threshold=1.2, max_weight=0.1)
    rollout = guidance.sample("coin", *models, PROMPTS[:2], length=LENGTH)
    is_open = torch.tensor(rollout.guidance_weights) > 0
    assert (is_open.any(0) & ~is_open.all(0)).sum() > 5
    assert is_open.all(0).sum() > 5
    assert_recorded(rollout, *models, PROMPTS[:2], guidance)


def test_the_expert_draws_the_tokens_of_heads(models, heads):
    """Where all weight is on one token of the expert, that token stands at the heads, and there only."""
    policy, expert = models
    with torch.no_grad():
        expert.lm_head.weight.zero_()
        policy.lm_head.weight[6] = 0
        policy.lm_head.weight *= 5
    expert.lm_head.bias = torch.nn.Parameter(torch.tensor([-100.0] * 6 + [100.0]))
    policy.lm_head.bias = torch.nn.Parameter(torch.tensor([0.0] * 6 + [-100.0]))
    rollout = Guidance("constant", max_weight=WEIGHT).sample("coin", policy, expert, PROMPTS, length=LENGTH)
    assert [[token == 6 for token in row] for row in rollout.completion_ids] == heads.tolist() == rollout.expert_drawn
