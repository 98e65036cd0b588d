"""Any batch of any settings: every number is that of a fresh forward, and what cannot matter does not."""

import functools

import pytest
import torch
from hypothesis import strategies as st

from tests.models import tiny_model
from tests.properties import for_all
from tests.sampling.reference import Guidance, assert_recorded

VOCAB = 7
KINDS = st.sampled_from(["stepwise", "coin", 1, 2, 5, None])
GUIDANCES = st.builds(
    Guidance,
    weighting=st.sampled_from(["entropy", "hard_gate", "constant"]),
    threshold=st.sampled_from([0.01, 0.7, 1.2, 30.0]),
    max_weight=st.sampled_from([0.0, 0.4, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.6]),
    first_token_from_expert=st.booleans(),
)
PROMPTS = st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=6)
BATCHES = PROMPTS.flatmap(
    lambda prompts: st.tuples(st.just(prompts), st.lists(st.booleans(), min_size=len(prompts), max_size=len(prompts)))
)


@functools.cache
def models(architecture: str):
    return tiny_model(seed=1, architecture=architecture), tiny_model(seed=2, architecture=architecture, sharpness=2.0)


@for_all(
    examples=40,
    batch=BATCHES,
    guidance=GUIDANCES,
    kind=KINDS,
    length=st.integers(1, 11),
    ends=st.sets(st.integers(0, VOCAB - 1), max_size=3),
    architecture=st.sampled_from(["llama", "gpt2"]),
    seed=st.integers(0, 2**31),
)
def test_a_random_batch(batch, guidance, kind, length, ends, architecture, seed):
    prompts, is_guided = batch
    torch.manual_seed(seed)
    rollout = guidance.sample(kind, *models(architecture), prompts, length, ends, is_guided=is_guided)
    for ids in rollout.completion_ids:
        assert not ends & set(ids[:-1])
        assert len(ids) == length or ids[-1] in ends
    for guided, law in (
        (True, guidance),
        (False, Guidance("constant", max_weight=0.0, temperature=guidance.temperature)),
    ):
        rows = [row for row, flag in enumerate(is_guided) if flag == guided]
        assert_recorded(rollout.take(rows), *models(architecture), [prompts[row] for row in rows], law)
    if not any(is_guided):
        assert rollout.policy_forwards == rollout.expert_forwards == 0


@for_all(
    examples=20,
    batch=BATCHES,
    guidance=GUIDANCES,
    length=st.integers(1, 11),
    lengths=st.lists(st.one_of(st.integers(1, 12), st.none()), min_size=2, max_size=2, unique=True),
    seed=st.integers(0, 2**31),
)
def test_the_draft_length_changes_nothing(batch, guidance, length, lengths, seed):
    prompts, is_guided = batch
    rollouts = []
    for draft_length in lengths:
        torch.manual_seed(seed)
        rollouts.append(guidance.sample(draft_length, *models("llama"), prompts, length, {1}, is_guided=is_guided))
    one, other = rollouts
    assert one.completion_ids == other.completion_ids
    assert one.expert_drawn == other.expert_drawn
    for row, logps in enumerate(one.sampling_per_token_logps):
        assert logps == pytest.approx(other.sampling_per_token_logps[row], abs=1e-4)
