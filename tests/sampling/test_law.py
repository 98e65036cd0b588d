"""Completions have the law of pi_mix: a chi-square against all completions, enumerated; ragged prompts in one batch, ends inside drafts."""

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance, entropy_of, enumerated_law, expected_record, fresh_probs

EOS = {1, 4}
KINDS = ["stepwise", "coin", 1, 3, None]
COPIES = 2500

SETTINGS = {
    "ramp": Guidance(threshold=1.5),
    "ramp_cooled": Guidance(threshold=1.2, temperature=0.8),
    "ramp_capped": Guidance(threshold=0.5, max_weight=0.6),
    "gate": Guidance("hard_gate", threshold=1.0, max_weight=0.9),
    "expert_first": Guidance(threshold=2.0, first_token_from_expert=True),
    "expert_lacks_tokens": Guidance(threshold=1.5, expert_vocab_size=5),
    "w0": Guidance("constant", max_weight=0.0, temperature=0.8),
    "w1": Guidance("constant", max_weight=1.0),
}


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=2)


def assert_follows(counts: Counter, law: dict) -> None:
    """A chi-square test; outcomes that are expected fewer than 5 times count as one."""
    assert set(counts) <= set(law)
    num = sum(counts.values())
    common = [outcome for outcome, chance in law.items() if chance * num >= 5]
    observed = [counts[outcome] for outcome in common]
    expected = [law[outcome] * num for outcome in common]
    if (rest := num - sum(expected)) > 5:
        observed.append(num - sum(observed))
        expected.append(rest)
    else:  # too rare for a class of its own
        observed[0] += num - sum(observed)
        expected[0] += rest
    assert len(common) > 5
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_completions_follow_the_mixture(models, setting, kind):
    guidance = SETTINGS[setting]
    prompts = [prompt for _ in range(COPIES) for prompt in PROMPTS]
    rollout = guidance.sample(kind, *models, prompts, length=3, eos=EOS)
    for index, prompt in enumerate(PROMPTS):
        counts = Counter(map(tuple, rollout.completion_ids[index :: len(PROMPTS)]))
        assert_follows(counts, enumerated_law(*models, prompt, 3, EOS, guidance))


def test_the_test_tells_laws_apart(models):
    """The mixtures of the settings, the policy and the expert differ by far more than the chi-square allows."""
    prompts = [PROMPTS[0]] * COPIES
    rollout = SETTINGS["ramp"].sample("stepwise", *models, prompts, length=3, eos=EOS)
    counts = Counter(map(tuple, rollout.completion_ids))
    for other in set(SETTINGS) - {"ramp"}:
        law = enumerated_law(*models, PROMPTS[0], 3, EOS, SETTINGS[other])
        with pytest.raises(AssertionError):
            assert_follows(counts, law)


def test_with_w_0_and_1_the_reference_is_one_model(models):
    """So that the reference itself is right where it can be said without it."""
    policy, expert = models
    for name, model in {"w0": policy, "w1": expert}.items():
        guidance = SETTINGS[name]
        law = enumerated_law(policy, expert, PROMPTS[0], 2, EOS, guidance)
        first = fresh_probs(model, [PROMPTS[0]], guidance)[0, -1]
        second = fresh_probs(model, [[*PROMPTS[0], 3]], guidance)[0, -1]
        assert law[3, 5] == pytest.approx((first[3] * second[5]).item())
        assert law[1,] == pytest.approx(first[1].item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", ["ramp", "ramp_cooled", "gate"])
def test_who_drew_a_token(models, setting, kind):
    """Jointly with the token: P(y, expert drew it) = (pi_mix(y) - pi(y))+ = w (pi*(y) - pi(y))+."""
    guidance, num = SETTINGS[setting], 12_000
    policy, expert = (fresh_probs(model, [PROMPTS[0]], guidance)[0, -1] for model in models)
    weight = guidance.weight(entropy_of(policy), 0)
    by_expert = weight * (expert - policy).clamp(min=0)
    law = {(y, True): by_expert[y].item() for y in range(7)}
    law |= {(y, False): torch.minimum(policy, (1 - weight) * policy + weight * expert)[y].item() for y in range(7)}
    rollout = guidance.sample(kind, *models, [PROMPTS[0]] * num, length=1)
    counts = Counter((y[0], drawn[0]) for y, drawn in zip(rollout.completion_ids, rollout.expert_drawn, strict=True))
    assert_follows(counts, {outcome: chance for outcome, chance in law.items() if chance > 0})


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_draws_a_share_of_w_times_the_total_variation(models, kind):
    guidance = SETTINGS["ramp"]
    prompts = PROMPTS * 100
    rollout = guidance.sample(kind, *models, prompts, length=10)
    drawn = sum(map(sum, rollout.expert_drawn))
    rejected = torch.cat(
        [
            expected_record(*models, *row, guidance).rejected
            for row in zip(prompts, rollout.completion_ids, strict=True)
        ]
    )
    assert 0.1 < rejected.mean() < 0.9
    # Whether a token is drawn by the expert does not depend on what else happens: the variance is that of independent coins.
    deviation = (rejected * (1 - rejected)).sum().sqrt().item()
    assert abs(drawn - rejected.sum().item()) < 4 * deviation


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_guides_itself_is_never_corrected(models, kind):
    policy, _ = models
    rollout = SETTINGS["w1"].sample(kind, policy, policy, PROMPTS * 50, length=8)
    assert not any(map(any, rollout.expert_drawn))
    assert max(abs(ratio) for row in rollout.log_ratios() for ratio in row.tolist()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_the_policy_cannot_draw(models, kind):
    """A policy that is certain of one token, an expert certain of another: w decides alone, and every record stays finite."""
    certain = [tiny_model(seed=seed) for seed in (1, 1)]
    for token, model in zip((3, 5), certain, strict=True):
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.model.norm.weight.fill_(1e4)
            model.model.embed_tokens.weight.fill_(1.0)
            hidden = model.model(torch.tensor([[2]])).last_hidden_state[0, -1]
            model.lm_head.weight[token] = hidden.sign()
    guidance = Guidance("constant", max_weight=0.25)
    rollout = guidance.sample(kind, *certain, [[2]] * 2000, length=1)
    tokens = Counter(row[0] for row in rollout.completion_ids)
    assert set(tokens) == {3, 5}
    assert abs(tokens[5] - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)
    for row, drawn, logps in zip(
        rollout.completion_ids, rollout.expert_drawn, rollout.sampling_per_token_logps, strict=True
    ):
        assert drawn == [row == [5]]
        assert logps[0] == pytest.approx(math.log(0.25 if row == [5] else 0.75), abs=1e-6)
