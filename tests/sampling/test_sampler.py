"""Which sampler is chosen, and what is refused."""

import pytest
import torch

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, fresh_probs
from tests.sampling.reference import Guidance as Setting
from trl_selective.sampling import CoinSampler, SpeculativeSampler, StepwiseSampler, make_sampler

SAMPLERS = [StepwiseSampler, CoinSampler, SpeculativeSampler]


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=2)


def sample(sampler, **changes):
    call = {"entropy_threshold": 1.0, "max_completion_length": 3, "eos_token_ids": {1}, **changes}
    return sampler.sample(call.pop("prompt_ids", PROMPTS), **call)


def make(name, policy, expert, draft_length=None, **kwargs):
    return make_sampler(name, policy, expert, draft_length=draft_length, max_draft_length=9, **kwargs)


def test_auto(models):
    sliding = tiny_model(1, "sliding")
    assert type(make("auto", *models)) is SpeculativeSampler
    assert make("auto", *models, draft_length=3).draft_length == 3
    assert type(make("auto", sliding, models[1], draft_length=3)) is CoinSampler
    assert type(make("auto", models[0], sliding, draft_length=3)) is CoinSampler


def test_by_name(models):
    assert type(make("stepwise", *models, draft_length=3)) is StepwiseSampler
    assert type(make("coin", *models, draft_length=3)) is CoinSampler
    fixed, chosen = make("speculative", *models, draft_length=3), make("speculative", *models)
    assert type(fixed) is type(chosen) is SpeculativeSampler
    assert (fixed.draft_length, chosen.draft_length, chosen.lookahead(1).max_length) == (3, None, 9)
    with pytest.raises(ValueError, match="sliding-window or recurrent layers"):
        make("speculative", models[0], tiny_model(1, "sliding"))


@pytest.mark.parametrize("name", ["stepwise", "coin", "speculative"])
def test_settings_reach_the_sampler(models, name):
    sampler = make(
        name,
        *models,
        weighting="constant",
        max_weight=0.25,
        vocab_size=5,
        pad_token_id=2,
        first_token_from_expert=True,
    )
    rollout = sample(sampler, eos_token_ids=())
    assert rollout.guidance_weights == [[1.0, 0.25, 0.25]] * 3
    assert max(map(max, rollout.completion_ids)) < 5
    assert sampler.pad_token_id == 2


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_weighting_of_ones_own(models, sampler_class):
    def weighting(entropy, threshold, max_weight):
        return torch.where(entropy > threshold, 0.125, 0.5) * max_weight

    rollout = sample(sampler_class(*models, weighting=weighting, max_weight=0.5), max_completion_length=10)
    for weights, entropies in zip(rollout.guidance_weights, rollout.entropies, strict=True):
        assert weights == [0.0625 if entropy > 1.0 else 0.25 for entropy in entropies]


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_threshold_of_0_and_of_infinity(models, sampler_class):
    sampler = sampler_class(*models)
    assert {w for row in sample(sampler, entropy_threshold=0).guidance_weights for w in row} == {1.0}
    assert {w for row in sample(sampler, entropy_threshold=float("inf")).guidance_weights for w in row} == {0.0}


@pytest.mark.parametrize("sampler_class", SAMPLERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weighting": "entrpy"},
            r"weighting must be one of \['constant', 'entropy', 'hard_gate'\] or a function, got 'entrpy'",
        ),
        ({"max_weight": 1.5}, r"max_weight must lie in \[0, 1\], got 1.5"),
        ({"max_weight": -0.1}, r"max_weight must lie in \[0, 1\], got -0.1"),
        ({"max_weight": float("nan")}, r"max_weight must lie in \[0, 1\], got nan"),
    ],
)
def test_settings_that_are_refused(models, sampler_class, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler_class(*models, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_length": 0}, "must be at least 1, got 0 and 16"),
        ({"draft_length": 4, "max_draft_length": 0}, "must be at least 1, got 4 and 0"),
    ],
)
def test_draft_lengths_that_are_refused(models, settings, message):
    with pytest.raises(ValueError, match=f"draft_length and max_draft_length {message}"):
        SpeculativeSampler(*models, **settings)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt_ids": []}, r"at least one token each, got 0 prompts, empty ones in rows \[\]"),
        ({"prompt_ids": [[2], [], [3], []]}, r"at least one token each, got 4 prompts, empty ones in rows \[1, 3\]"),
        ({"temperature": 0.0}, "temperature > 0, .* got 0.0, 1.0 and 3"),
        ({"temperature": -1.0}, "temperature > 0, .* got -1.0, 1.0 and 3"),
        ({"entropy_threshold": -0.5}, "entropy_threshold >= 0 .* got 1.0, -0.5 and 3"),
        ({"entropy_threshold": float("nan")}, "entropy_threshold >= 0 .* got 1.0, nan and 3"),
        ({"max_completion_length": 0}, "max_completion_length >= 1, got 1.0, 1.0 and 0"),
        ({"is_guided": [True]}, "is_guided must have one entry per prompt, got 1 for 3 prompts"),
    ],
)
def test_calls_that_are_refused(models, sampler_class, call, message):
    with pytest.raises(ValueError, match=message):
        sample(sampler_class(*models), **call)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
@pytest.mark.parametrize("role", [0, 1], ids=["policy", "expert"])
def test_a_model_that_returns_nan_is_named_and_stops(sampler_class, role):
    models = [tiny_model(seed=1), tiny_model(seed=2)]
    with torch.no_grad():
        models[role].lm_head.weight.fill_(torch.nan)
    message = (
        r"Row 0, token 0 has log pi_mix = nan .* the policy or the expert returned a distribution that is not finite"
    )
    with pytest.raises(ValueError, match=message):
        sample(sampler_class(*models, weighting="constant", max_weight=0.5))


def test_temperature_divides_the_logits_of_both(models):
    """The reference of all tests of laws: at half the temperature, probabilities are squared and normalised."""
    warm, cold = Setting(temperature=1.0), Setting(temperature=0.5)
    for model in models:
        squared = fresh_probs(model, PROMPTS[:1], warm).square()
        torch.testing.assert_close(fresh_probs(model, PROMPTS[:1], cold), squared / squared.sum(-1, keepdim=True))


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_the_law_of_a_large_vocabulary_is_normalised(models, sampler_class):
    """Over 150,000 ids of which one is likely, a softmax in float32 alone may be off by 2e-4."""
    logits = torch.zeros(1, 1, 150_000)
    logits[..., 7] = 17.4
    sampler = sampler_class(*models)
    sampler.vocab_size = sampler.policy_vocab_size = 150_000
    for probs in (sampler._probs(logits, 1.0), sampler._expert_law(logits, 1.0)):
        torch.testing.assert_close(probs.log().double(), logits.double().log_softmax(-1), rtol=0, atol=2e-6)
