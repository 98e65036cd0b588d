"""With an expert that only draws, through a real client and a server: the law, what is asked, what is recorded."""

import math
from collections import Counter

import pytest
import torch

from tests.endpoint import VllmEndpoint
from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded, enumerated_law, expected_record
from tests.sampling.test_law import assert_follows
from trl_selective.experts import ExpertServer
from trl_selective.sampling import RemoteCoinSampler

EOS = {1, 4}


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=2)


@pytest.fixture(scope="module")
def endpoint(models):
    with VllmEndpoint(models[1], encode=lambda text: [2]) as endpoint:
        yield endpoint


def sample(policy, endpoint, guidance: Guidance, prompts, length: int, eos=(1,), scores=False, **kwargs):
    """A rollout, and the bodies of the requests that it took."""
    server = ExpertServer(endpoint.url, "the-expert", vocab_size=7, eos_token_ids=eos, scores=scores)
    sampler = RemoteCoinSampler(
        policy,
        server,
        weighting=guidance.weighting,
        max_weight=guidance.max_weight,
        first_token_from_expert=guidance.first_token_from_expert,
    )
    endpoint.requests.clear()
    rollout = sampler.sample(
        prompts,
        entropy_threshold=guidance.threshold,
        max_completion_length=length,
        eos_token_ids=eos,
        temperature=guidance.temperature,
        **kwargs,
    )
    return rollout, [body for _, body in endpoint.requests]


@pytest.mark.parametrize(
    "guidance",
    [Guidance(threshold=4.0, temperature=0.8), Guidance("constant", max_weight=1.0)],
    ids=["ramp_cooled", "w1"],
)
def test_completions_follow_the_mixture(models, endpoint, guidance):
    prompt, copies = PROMPTS[0], 1000
    rollout, requests = sample(models[0], endpoint, guidance, [prompt] * copies, length=2, eos=EOS)
    counts = Counter(map(tuple, rollout.completion_ids))
    assert_follows(counts, enumerated_law(*models, prompt, 2, EOS, guidance))
    assert not rollout.is_scored
    assert {body["temperature"] for body in requests} == {guidance.temperature}
    for other in ({"temperature": 1.3}, {"max_weight": 0.5, "weighting": "constant"}, {"weighting": "hard_gate"}):
        law = enumerated_law(*models, prompt, 2, EOS, Guidance(**{**vars(guidance), **other}))
        with pytest.raises(AssertionError):
            assert_follows(counts, law)


def test_the_expert_is_asked_where_a_coin_shows_heads(models, endpoint):
    """One request a token at heads, and none for rows that are not guided; the text of the row, to the token; another seed each."""
    guidance, prompts = Guidance(threshold=4.0), PROMPTS * 20
    is_guided = [row % 4 != 0 for row in range(len(prompts))]
    rollout, requests = sample(models[0], endpoint, guidance, prompts, length=10, eos=EOS, is_guided=is_guided)
    weights = torch.tensor([weight for row in rollout.guidance_weights for weight in row])
    assert all((not any(row)) != guided for row, guided in zip(rollout.guidance_weights, is_guided, strict=True))
    assert len(set(map(len, rollout.completion_ids))) > 4
    assert len(requests) == rollout.expert_forwards == sum(map(sum, rollout.expert_drawn))
    deviation = (weights * (1 - weights)).sum().sqrt().item()
    assert abs(len(requests) - weights.sum().item()) < 4 * deviation
    asked = Counter(tuple(body["prompt"]) for body in requests)
    assert asked == Counter(
        (*prompt, *ids[:position])
        for prompt, ids, drawn in zip(prompts, rollout.completion_ids, rollout.expert_drawn, strict=True)
        for position in range(len(ids))
        if drawn[position]
    )
    assert len({body["seed"] for body in requests}) == len(requests)


def test_the_whole_law_is_asked_for(models, endpoint):
    """A server fills what it is not told from the model's own generation config."""
    _, (body, *_) = sample(models[0], endpoint, Guidance("constant"), [[3]], length=1)
    expected = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    expected |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0, "return_tokens_as_token_ids": True}
    assert {name: body[name] for name in expected} == expected
    assert set(body) == {*expected, "model", "prompt", "seed", "add_special_tokens"}


def test_what_is_not_known_is_not_said(models, endpoint):
    guidance = Guidance("hard_gate", threshold=1.3, max_weight=0.5)
    rollout, _ = sample(models[0], endpoint, guidance, PROMPTS * 4, length=8)
    for row, (logps, policy, weights) in enumerate(
        zip(
            rollout.sampling_per_token_logps,
            rollout.policy_per_token_logps,
            rollout.guidance_weights,
            strict=True,
        )
    ):
        assert [math.isnan(logp) for logp in logps] == [weight > 0 for weight in weights], row
        assert [a for a, w in zip(logps, weights, strict=True) if not w] == [
            p for p, w in zip(policy, weights, strict=True) if not w
        ]
    assert sum(map(any, rollout.guidance_weights)) / len(PROMPTS * 4) > 0.1


@pytest.mark.parametrize("guidance", [Guidance(threshold=2.0), Guidance("hard_gate", threshold=1.3, max_weight=0.5)])
def test_scored_the_record_is_whole(models, endpoint, guidance):
    """log pi_mix of every token, and the same law of who drew it as with the other samplers: w TV."""
    prompts = PROMPTS * 40
    rollout, requests = sample(models[0], endpoint, guidance, prompts, length=8, scores=True)
    assert rollout.is_scored
    assert_recorded(rollout, *models, prompts, guidance)
    assert sum(body.get("echo", False) for body in requests) == sum(map(any, rollout.guidance_weights))
    changed = torch.cat(
        [
            expected_record(*models, *row, guidance).rejected
            for row in zip(prompts, rollout.completion_ids, strict=True)
        ]
    )
    deviation = (changed * (1 - changed)).sum().sqrt().item()
    assert abs(sum(map(sum, rollout.expert_drawn)) - changed.sum().item()) < 4 * deviation


def test_one_seed_one_rollout(models, endpoint):
    def again(seed):
        torch.manual_seed(seed)
        return sample(models[0], endpoint, Guidance(threshold=2.0), PROMPTS * 2, length=8)[0].completion_ids

    assert again(3) == again(3) != again(4)


def test_a_policy_that_is_not_finite_is_named(models, endpoint):
    broken = tiny_model(seed=1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"log pi_theta = nan and guidance weight w = 1.0, .*Look for NaN or inf"):
        sample(broken, endpoint, Guidance("constant"), [[3]], length=1)


def test_other_temperatures_are_not_scored(models, endpoint):
    with pytest.raises(ValueError, match=r"gives probabilities at temperature 1 alone, got 0\.8\. Use that, or"):
        sample(models[0], endpoint, Guidance(temperature=0.8), [[3]], length=1, scores=True)
