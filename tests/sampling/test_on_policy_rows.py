"""Rows that are not guided, in one loop with those that are: drawn from the policy, unread by the expert, and of no influence on the others."""

import pytest
import torch

from tests.models import MINDFUL, tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded, fresh_probs
from tests.sampling.test_law import assert_follows, enumerated_law
from trl_selective.sampling import live_rows

KINDS = ["stepwise", "coin", 1, 3, 8, None]
LENGTH = 12
ALL = PROMPTS * 4
FLAGS = [row % 5 in (1, 4) for row in range(len(ALL))]  # 5 of 12, in every place of a batch
GUIDED = [row for row, is_guided in enumerate(FLAGS) if is_guided]
OTHERS = [row for row, is_guided in enumerate(FLAGS) if not is_guided]
GUIDANCES = {
    "ramp": Guidance(threshold=1.2),
    "expert_first": Guidance(threshold=2.0, first_token_from_expert=True),
    "w1": Guidance("constant", max_weight=1.0),
}
W0 = Guidance("constant", max_weight=0.0)


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=2)


@pytest.fixture(params=GUIDANCES)
def guidance(request):
    return GUIDANCES[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_a_fresh_forward(models, guidance, kind):
    rollout = guidance.sample(kind, *models, ALL, length=LENGTH, eos={1}, is_guided=FLAGS)
    assert len(set(map(len, rollout.completion_ids))) > 1
    assert_recorded(rollout.take(GUIDED), *models, [ALL[row] for row in GUIDED], guidance)
    on_policy = rollout.take(OTHERS)
    assert_recorded(on_policy, *models, [ALL[row] for row in OTHERS], W0)
    assert not any(map(any, on_policy.guidance_weights))
    assert not any(map(any, on_policy.expert_drawn))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_no_influence_on_those_of_the_other_kind(models, guidance, kind, monkeypatch):
    noise = torch.rand(len(ALL), LENGTH, 3, dtype=torch.float64)

    def sample(rows, setting, **kwargs):
        monkeypatch.setattr(live_rows, "position_noise", lambda num, positions, device: noise[rows])
        return setting.sample(kind, *models, [ALL[row] for row in rows], length=LENGTH, eos={1}, **kwargs)

    together = sample(range(len(ALL)), guidance, is_guided=FLAGS)
    assert together.take(GUIDED).completion_ids == sample(GUIDED, guidance).completion_ids
    assert together.take(OTHERS).completion_ids == sample(OTHERS, W0).completion_ids


@pytest.mark.parametrize("kind", KINDS)
def test_they_follow_the_policy(models, kind):
    prompts = PROMPTS[:1] * 5000
    is_guided = [row % 2 == 0 for row in range(5000)]
    guidance = GUIDANCES["w1"]
    rollout = guidance.sample(kind, *models, prompts, length=2, eos={1}, is_guided=is_guided)
    for first, law in ((0, guidance), (1, W0)):
        counts = {}
        for row in rollout.completion_ids[first::2]:
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        expected = enumerated_law(*models, PROMPTS[0], 2, {1}, law)
        assert_follows(counts | {y: 0 for y in expected if y not in counts}, expected)
    difference = fresh_probs(models[0], PROMPTS[:1], W0) - fresh_probs(models[1], PROMPTS[:1], W0)
    assert difference[0, -1].abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_does_not_read_them(models, kind):
    """Nor their prompts; and counts are those of guided rows."""
    read = {"policy": 0, "expert": 0}
    hooks = [
        model.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: read.__setitem__(name, read[name] + kwargs["input_ids"].shape[0]),
            with_kwargs=True,
        )
        for name, model in zip(read, models, strict=True)
    ]
    prompts = [PROMPTS[0]] * 3 + [PROMPTS[2]] * 5
    rollout = GUIDANCES["ramp"].sample(kind, *models, prompts, length=LENGTH, is_guided=[True] * 3 + [False] * 5)
    for hook in hooks:
        hook.remove()
    assert read["expert"] == 1 + rollout.expert_forwards
    assert rollout.expert_forwards <= rollout.take(range(3)).num_tokens <= rollout.policy_forwards
    if kind in ("stepwise", "coin"):
        assert rollout.policy_forwards == 3 * LENGTH
    else:
        assert rollout.policy_forwards == rollout.num_drafted


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_guided_row_there_is_no_expert(models, kind):
    policy, _ = models
    expert = tiny_model(3)
    expert.register_forward_pre_hook(lambda *_: pytest.fail("the expert is asked"))
    sampler = GUIDANCES["w1"].sampler(kind, policy, expert)
    rollout = sampler.sample(
        ALL, entropy_threshold=1.0, max_completion_length=LENGTH, eos_token_ids={1}, is_guided=[False] * len(ALL)
    )
    assert_recorded(rollout, *models, ALL, W0)
    assert rollout.expert_forwards == rollout.policy_forwards == rollout.num_drafted == 0
    if kind is None:  # forwards that did not happen say nothing about their cost
        assert all(sampler.lookahead(num).rounds == 0 for num in range(1, 9))


@pytest.mark.parametrize("architecture", MINDFUL)
@pytest.mark.parametrize("kind", ["stepwise", "coin"])
def test_caches_that_cannot_forget(architecture, kind):
    models = tiny_model(1, architecture), tiny_model(2, architecture)
    guidance = GUIDANCES["ramp"]
    rollout = guidance.sample(kind, *models, ALL, length=LENGTH, eos={1}, is_guided=FLAGS)
    assert_recorded(rollout.take(GUIDED), *models, [ALL[row] for row in GUIDED], guidance)
    assert_recorded(rollout.take(OTHERS), *models, [ALL[row] for row in OTHERS], W0)


def test_holes_are_removed(models):
    guidance = Guidance("constant", max_weight=0.9)
    rollout = guidance.sample(8, *models, ALL, length=40, is_guided=FLAGS)
    assert_recorded(rollout.take(GUIDED), *models, [ALL[row] for row in GUIDED], guidance)
    assert_recorded(rollout.take(OTHERS), *models, [ALL[row] for row in OTHERS], W0)
