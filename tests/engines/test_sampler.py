"""The sampler whose policy is in an engine, with an engine of transformers: the law, the record, who is asked for what."""

from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from tests.endpoint import VllmEndpoint
from tests.engines.fresh_forwards import FreshForwards
from tests.engines.transformers_engine import TransformersEngine
from tests.models import tiny_model
from tests.sampling.reference import (
    PROMPTS,
    Guidance,
    assert_recorded,
    enumerated_law,
    expected_record,
)
from tests.sampling.test_law import assert_follows
from tests.training import POLICY
from trl_selective.engines.coin import Coin
from trl_selective.engines.sampler import VllmCoinSampler, choose_sentinel
from trl_selective.experts import ExpertServer, ExpertServerError

EOS = {1, 4}
HEAD = 8  # of these, 7 ids are tokens


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1, vocab_size=HEAD), tiny_model(seed=2, vocab_size=HEAD)


@pytest.fixture(scope="module")
def served():
    """An expert that knows the tokens alone."""
    return tiny_model(seed=2)


@pytest.fixture(scope="module")
def endpoint(served):
    with VllmEndpoint(served, encode=lambda text: [2]) as endpoint:
        yield endpoint


def sampler(models, guidance: Guidance, expert=None, engine=None, sentinel=7) -> VllmCoinSampler:
    coin = Coin(guidance.weighting, 0.0, guidance.max_weight, guidance.vocab_size, sentinel)
    engine = engine or TransformersEngine(models[0])
    return VllmCoinSampler(
        engine,
        models[0],
        expert or models[1],
        coin,
        expert_vocab_size=guidance.expert_vocab_size,
        first_token_from_expert=guidance.first_token_from_expert,
    )


def sample(models, guidance, prompts, length, eos=(), **kwargs):
    return sampler(models, guidance, **kwargs).sample(
        prompts,
        entropy_threshold=guidance.threshold,
        max_completion_length=length,
        eos_token_ids=eos,
        temperature=guidance.temperature,
    )


def server(endpoint, scores=False, eos=(1,)) -> ExpertServer:
    return ExpertServer(endpoint.url, "the-expert", vocab_size=7, eos_token_ids=eos, scores=scores, patience=0.5)


SETTINGS = {
    "ramp_cooled": Guidance(threshold=2.0, temperature=0.8),
    "gate": Guidance("hard_gate", threshold=1.0, max_weight=0.7),
    "expert_first": Guidance(threshold=4.0, first_token_from_expert=True),
    "expert_lacks_tokens": Guidance(threshold=2.0, expert_vocab_size=5),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_completions_follow_the_mixture(models, setting):
    guidance, copies = SETTINGS[setting], 700
    prompts = [prompt for _ in range(copies) for prompt in PROMPTS]
    rollout = sample(models, guidance, prompts, 2, eos=EOS)
    for index, prompt in enumerate(PROMPTS):
        counts = Counter(map(tuple, rollout.completion_ids[index :: len(PROMPTS)]))
        assert_follows(counts, enumerated_law(*models, prompt, 2, EOS, guidance))
        for weight in (0.0, 1.0):
            other = enumerated_law(*models, prompt, 2, EOS, Guidance("constant", max_weight=weight))
            with pytest.raises(AssertionError):
                assert_follows(counts, other)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_record_is_that_of_the_models(models, setting):
    """Prompts of different lengths, rows of different lengths, an expert that reads them in its own order."""
    guidance, prompts = SETTINGS[setting], PROMPTS * 15
    rollout = sample(models, guidance, prompts, 12, eos=EOS)
    assert rollout.is_scored
    assert len(set(map(len, rollout.completion_ids))) > 5
    assert_recorded(rollout, *models, prompts, guidance)
    weights = torch.tensor([weight for row in rollout.guidance_weights for weight in row])
    deviation = (weights * (1 - weights)).sum().sqrt().item()
    assert abs(rollout.expert_forwards - weights.sum().item()) < 4 * deviation
    changed = torch.cat(
        [
            expected_record(*models, *row, guidance).rejected
            for row in zip(prompts, rollout.completion_ids, strict=True)
        ]
    )
    deviation = (changed * (1 - changed)).sum().sqrt().item()
    assert abs(sum(map(sum, rollout.expert_drawn)) - changed.sum().item()) < 4 * deviation


def test_an_expert_that_reads_now_and_then_says_what_it_would_say_at_once(models, monkeypatch):
    """The same tokens with a cache of holes, and with fresh forwards: those of an expert behind a server that keeps seeds."""
    guidance = Guidance(threshold=2.0)
    monkeypatch.setattr("trl_selective.engines.asking.SEEDS", 2**63)
    prompts = PROMPTS * 10
    torch.manual_seed(1)
    here = sample(models, guidance, prompts, 16)
    torch.manual_seed(1)
    there = sample(models, guidance, prompts, 16, expert=FreshForwards(models[1]))
    assert here.completion_ids == there.completion_ids
    assert here.expert_forwards == there.expert_forwards > 30


def test_an_expert_behind_a_server(models, endpoint):
    """One request for each token at heads, with the row's text; and one more for each row that is scored."""
    guidance, prompts = Guidance(threshold=4.0), PROMPTS * 10
    endpoint.requests.clear()
    rollout = sample(models, guidance, prompts, 10, eos=EOS, expert=server(endpoint, eos=EOS))
    asked = Counter(tuple(body["prompt"]) for _, body in endpoint.requests)
    assert asked == Counter(
        (*prompt, *ids[:position])
        for prompt, ids, drawn in zip(prompts, rollout.completion_ids, rollout.expert_drawn, strict=True)
        for position in range(len(ids))
        if drawn[position]
    )
    assert not rollout.is_scored
    assert rollout.policy_forwards == rollout.num_tokens
    assert 0 < rollout.expert_forwards == len(endpoint.requests) < rollout.num_tokens


def test_a_server_that_scores(models, served, endpoint):
    guidance, prompts = Guidance(threshold=2.0), PROMPTS * 5
    rollout = sample(models, guidance, prompts, 8, eos=EOS, expert=server(endpoint, scores=True, eos=EOS))
    assert rollout.is_scored
    assert_recorded(rollout, models[0], served, prompts, guidance)


def test_a_server_that_is_gone_ends_the_rollout(models, served):
    endpoint = VllmEndpoint(served, encode=lambda text: [2]).__enter__()
    expert, engine = server(endpoint), TransformersEngine(models[0])
    endpoint.__exit__()
    with pytest.raises(ExpertServerError, match="does not answer as it should"):
        sample(models, Guidance("constant", max_weight=0.5), PROMPTS * 5, 8, expert=expert, engine=engine)
    assert not engine.is_busy


def test_an_error_leaves_no_request_behind(models):
    class Broken(FreshForwards):
        def draw(self, texts, seeds, temperature):
            raise RuntimeError("gone")

    engine = TransformersEngine(models[0])
    with pytest.raises(RuntimeError, match="gone"):
        sample(models, Guidance("constant", max_weight=0.1), [[3]] * 40, 40, expert=Broken(models[1]), engine=engine)
    assert engine.num_steps < 40  # while others were still written
    assert not engine.is_busy


def test_a_seed_is_a_rollout_whatever_else_is_in_the_batch(models):
    """All numbers belong to a row and a position: the first rows do not see those behind them."""

    def again(seed, prompts):
        torch.manual_seed(seed)
        return sample(models, Guidance(threshold=2.0), prompts, 8).completion_ids

    assert again(3, PROMPTS) == again(3, PROMPTS + PROMPTS)[:3] == again(3, PROMPTS) != again(4, PROMPTS)


def test_rows_do_not_wait_for_each_other(models):
    """With a quarter of 32 rows waiting, the others go on: far fewer steps than rounds of all rows would take."""
    engine = TransformersEngine(models[0])
    rollout = sample(models, Guidance("constant", max_weight=0.2), [[3]] * 32, 20, engine=engine)
    assert rollout.num_tokens == 640
    assert len({request.seed for request in engine.requests}) == len(engine.requests) > 100  # no draw is repeated
    assert len({request.coin_seed for request in engine.requests if request.text == [3]}) == 32
    assert engine.num_steps < 45


def test_a_sentinel_that_is_a_token_is_never_drawn_by_the_policy(models):
    guidance = Guidance(threshold=2.0)
    rollout = sample(models, guidance, PROMPTS * 20, 10, sentinel=5)
    by_expert = [
        drawn
        for ids, flags in zip(rollout.completion_ids, rollout.expert_drawn, strict=True)
        for token, drawn in zip(ids, flags, strict=True)
        if token == 5
    ]
    assert by_expert
    assert all(by_expert)  # its law is untouched


def test_a_text_ends_where_the_engines_context_does(models):
    engine = TransformersEngine(models[0], max_model_len=9)
    rollout = sample(models, Guidance("constant", max_weight=0.5), PROMPTS * 4, 20, engine=engine)
    assert [len(ids) for ids in rollout.completion_ids] == [4, 8, 6] * 4


def test_an_answer_without_tokens_is_named(models):
    """As a server gives for a request that it aborts."""

    class Aborting(TransformersEngine):
        def poll(self, patient):
            return ((row, []) for row, _ in super().poll(patient))

    guide = sampler(models, Guidance(), engine=TransformersEngine(models[0]))
    guide.engine.__class__ = Aborting
    with pytest.raises(RuntimeError, match="ended a request without a token"):
        guide.sample(PROMPTS, entropy_threshold=1.0, max_completion_length=4, eos_token_ids=[1])


def test_an_engine_that_flips_no_coins_is_refused(models):
    class Plain(TransformersEngine):
        def submit(self, request, coin, *settings):
            super().submit(request, Coin("constant", 0.0, 0.0, 7, 7), *settings)

    message = r"does not guide: it drew \[\d, \d.*\] where it had to draw 7\. .*--logits-processors trl_selective\.engines\.processor:CoinLogits"
    with pytest.raises(ValueError, match=message):
        sampler(models, Guidance(), engine=Plain(models[0]))


def test_an_expert_that_cannot_have_holes_is_refused(models):
    with pytest.raises(ValueError, match=r"MistralForCausalLM, mistral\) cannot leave out columns.*Serve the expert"):
        sampler(models, Guidance(), expert=tiny_model(seed=2, architecture="sliding", vocab_size=HEAD))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_ids": []}, "Expected prompts of at least one token each, got 0 prompts"),
        ({"prompt_ids": [[2], []]}, r"empty ones in rows \[1\]"),
        ({"temperature": 0.0}, "Expected temperature > 0"),
    ],
)
def test_arguments_out_of_range(models, arguments, message):
    arguments = {"prompt_ids": [[2]], "entropy_threshold": 1.0, "max_completion_length": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        sampler(models, Guidance()).sample(arguments.pop("prompt_ids"), eos_token_ids=EOS, **arguments)


def tokenizer(pad=None, bos=None):
    """Of 45 tokens, of which 1 ends completions."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.pad_token, tokenizer.bos_token = (
        None if token is None else tokenizer.convert_ids_to_tokens(token) for token in (pad, bos)
    )
    return tokenizer


@pytest.mark.parametrize(
    ("head", "names", "sentinel"), [(46, {}, 45), (45, {"pad": 0, "bos": 2}, 0), (45, {"pad": 1, "bos": 2}, 2)]
)
def test_the_sentinel_is_what_no_completion_needs(head, names, sentinel):
    assert choose_sentinel(head, 45, tokenizer(**names), [1]) == sentinel


def test_where_every_id_is_needed_there_is_none():
    with pytest.raises(
        ValueError, match=r"all 45 ids of the policy's head are tokens, and pad_token '<eos>' and bos_"
    ):
        choose_sentinel(45, 45, tokenizer(pad=1), [1])
