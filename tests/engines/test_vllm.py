"""The real engine, vLLM's CPU build: the law of guided tokens, the record, requests without a coin; and its second interface, as far as it runs
without a GPU."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.endpoint import VllmEndpoint
from tests.engines.fresh_forwards import FreshForwards
from tests.engines.vllm_on_cpu import engine_of
from tests.models import tiny_model
from tests.sampling.reference import PROMPTS, Guidance, assert_recorded, enumerated_law
from tests.sampling.test_law import assert_follows
from tests.training import EXPERT, POLICY, path_dataset
from trl_selective.engines.coin import COIN, Coin, position_seeds, uniforms_of
from trl_selective.engines.engine import CLASS, LocalEngine, Request, check_version
from trl_selective.engines.sampler import VllmCoinSampler
from trl_selective.experts import ExpertServer, completion_logps

try:
    import vllm
except ImportError:
    vllm = None

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(vllm is None, reason="vLLM is not installed"),
]

EOS = {1, 4}
SETTINGS = {
    "ramp_cooled": Guidance(threshold=2.0, temperature=0.8),
    "gate": Guidance("hard_gate", threshold=1.0, max_weight=0.7),
    "expert_first": Guidance(threshold=4.0, first_token_from_expert=True),
}


@pytest.fixture(scope="module")
def models():
    """A head of 8 ids, of which 7 are tokens."""
    return tiny_model(seed=1, vocab_size=8, head_dim=32), tiny_model(seed=2, vocab_size=8)


@pytest.fixture(scope="module")
def llm(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    models[0].save_pretrained(folder)
    return engine_of(str(folder), skip_tokenizer_init=True, max_num_seqs=64)


def sampler(llm, models, guidance: Guidance, expert=None, sentinel=7) -> VllmCoinSampler:
    coin = Coin(guidance.weighting, 0.0, guidance.max_weight, guidance.vocab_size, sentinel)
    first = guidance.first_token_from_expert
    return VllmCoinSampler(LocalEngine(llm), models[0], expert or models[1], coin, first_token_from_expert=first)


def sample(llm, models, guidance, prompts, length, eos=(), **kwargs):
    return sampler(llm, models, guidance, **kwargs).sample(
        prompts,
        entropy_threshold=guidance.threshold,
        max_completion_length=length,
        eos_token_ids=eos,
        temperature=guidance.temperature,
    )


def assert_law(rollout, models, guidance):
    """That of three tokens behind each prompt; and neither the policy's nor the expert's."""
    for index, prompt in enumerate(PROMPTS):
        counts = Counter(map(tuple, rollout.completion_ids[index :: len(PROMPTS)]))
        assert_follows(counts, enumerated_law(*models, prompt, 3, EOS, guidance))
        for weight in (0.0, 1.0):
            alone = Guidance("constant", max_weight=weight, temperature=guidance.temperature)
            with pytest.raises(AssertionError):
                assert_follows(counts, enumerated_law(*models, prompt, 3, EOS, alone))


@pytest.mark.parametrize("setting", SETTINGS)
def test_completions_follow_the_mixture(llm, models, setting):
    guidance = SETTINGS[setting]
    rollout = sample(llm, models, guidance, PROMPTS * 700, 3, eos=EOS)
    assert_law(rollout, models, guidance)


def test_with_an_expert_behind_a_server_they_do_as_well(llm, models):
    guidance, expert = Guidance(threshold=4.0), tiny_model(seed=2)
    with VllmEndpoint(expert, encode=lambda text: [2]) as endpoint:
        server = ExpertServer(endpoint.url, endpoint.name, vocab_size=7, eos_token_ids=EOS)
        rollout = sample(llm, models, guidance, PROMPTS * 400, 3, eos=EOS, expert=server)
        assert_law(rollout, (models[0], expert), guidance)
        assert len(endpoint.requests) == rollout.expert_forwards


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_record_is_that_of_the_models(llm, models, setting):
    """And the expert is asked as often as the recorded weights say."""
    guidance, prompts = SETTINGS[setting], PROMPTS * 60
    rollout = sample(llm, models, guidance, prompts, 12, eos=EOS)
    assert rollout.is_scored
    assert_recorded(rollout, *models, prompts, guidance)
    weights = torch.tensor([weight for row in rollout.guidance_weights for weight in row])
    deviation = (weights * (1 - weights)).sum().sqrt().item()
    assert 0.1 < weights.mean() < 0.9
    assert abs(rollout.expert_forwards - weights.sum().item()) < 4 * deviation
    assert rollout.policy_forwards == rollout.num_tokens - len(prompts) * guidance.first_token_from_expert


def test_the_engine_flips_the_coins_that_it_is_told_to(llm, models):
    """Position by position, also where a request goes on behind a token of the expert: the number of row and position against the weight."""
    prompts, length = PROMPTS * 20, 12
    drawing = sampler(llm, models, Guidance(), expert=FreshForwards(models[1]))
    torch.manual_seed(5)
    seeds = torch.randint(2**62, (len(prompts),))
    after = torch.rand(1)
    torch.manual_seed(5)
    rollout = drawing.sample(prompts, entropy_threshold=3.0, max_completion_length=length, eos_token_ids=[])
    assert torch.rand(1) == after  # the engine's steps, however many, took nothing from the generator of training
    for row, (prompt, weights) in enumerate(zip(prompts, rollout.guidance_weights, strict=True)):
        positions = len(prompt) + torch.arange(len(weights))
        numbers = uniforms_of(position_seeds(seeds[row].expand(len(weights)), positions, COIN))
        assert rollout.expert_drawn[row] == (numbers < torch.tensor(weights)).tolist()
    assert 0.2 < sum(map(sum, rollout.expert_drawn)) / rollout.num_tokens < 0.8
    assert sample(llm, models, Guidance("constant", max_weight=0.0), prompts, length).expert_forwards == 0


def test_one_seed_one_rollout(llm, models):
    def again(seed):
        torch.manual_seed(seed)
        return sample(llm, models, Guidance(threshold=2.0), PROMPTS * 4, 12).completion_ids

    assert again(3) == again(3) != again(4)


def test_a_request_without_a_coin_is_what_it_is_without_the_processor(llm, models):
    """Alone and beside guided requests: the policy's own law, to the last log-probability."""
    engine, plain = (
        LocalEngine(llm),
        vllm.SamplingParams(max_tokens=8, seed=4, logprobs=0, ignore_eos=True, detokenize=False),
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    alone = llm.generate(prompts, plain, use_tqdm=False)
    for row in range(6):
        engine.submit(Request(row, [2, 3], 20, seed=row, coin_seed=row), Coin("constant", 0.0, 0.5, 7, 7), 1.0, [7])
    beside = beside_others(llm, prompts, plain)
    engine.abort()
    for prompt, first, second in zip(PROMPTS, alone, beside, strict=True):
        ids = list(first.outputs[0].token_ids)
        assert ids == list(second.outputs[0].token_ids)
        (logps,) = completion_logps(models[0], [prompt], [ids])
        for output in (first, second):
            said = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, ids, strict=True)]
            torch.testing.assert_close(torch.tensor(said), logps, rtol=0, atol=1e-4)


def beside_others(llm, prompts, params):
    """Outputs of requests that are in flight together with others."""
    for number, prompt in enumerate(prompts):
        llm.llm_engine.add_request(f"plain-{number}", prompt, params)
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    return [finished[f"plain-{number}"] for number in range(len(prompts))]


def test_what_is_aborted_leaves_nothing_behind(llm, models):
    class Broken:
        vocab_size, scores = 7, False

        def draw(self, texts, seeds, temperature):
            raise RuntimeError("gone")

        def completion_logps(self, prompt_ids, completion_ids): ...

    with pytest.raises(RuntimeError, match="gone"):
        sample(llm, models, Guidance("constant", max_weight=0.5), PROMPTS * 10, 12, expert=Broken())
    assert not llm.llm_engine.has_unfinished_requests()
    assert sample(llm, models, Guidance(threshold=2.0), PROMPTS, 4).num_tokens > 0


def test_half_a_coin_is_refused_at_admission(llm):
    for extra, temperature, message in (
        ({"coin_seed": 1}, 1.0, "A guided request carries"),
        (Coin("entropy", 1.0, 1.0, 7, 7).arguments(0), 0.0, "A guided request needs temperature > 0, got 0"),
    ):
        params = vllm.SamplingParams(max_tokens=1, extra_args=extra, temperature=temperature)
        with pytest.raises(vllm.exceptions.VLLMValidationError, match=message):
            llm.generate([{"prompt_token_ids": [2]}], params, use_tqdm=False)


def test_an_engine_without_the_processor_is_refused(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    plain = engine_of(str(tmp_path), skip_tokenizer_init=True, logits_processors=None)
    with pytest.raises(ValueError, match=r"does not guide: .*--logits-processors trl_selective\.engines\.processor:"):
        sampler(plain, models, Guidance())


# ---- The second interface --------------------------------------------------------------------------------------------------------------


def test_a_runner_of_the_second_generation_gets_the_same_rows():
    """Its loader takes the class; its rows come in any order, some of them drafts of one request, and each is flipped as by itself."""
    from vllm.v1.worker.gpu.sample.logits_processor import (
        build_custom_logits_processors,
        build_custom_logits_processors_params_validator,
    )

    names = ("max_num_reqs", "vocab_size", "all_token_ids", "prompt_len", "prefill_len", "total_len")
    states = SimpleNamespace(device=torch.device("cpu"), **dict.fromkeys(names))
    (processor,) = build_custom_logits_processors(None, states, False, [CLASS])
    coin = Coin("entropy", 3.0, 1.0, 7, 7)
    params = [vllm.SamplingParams(extra_args=coin.arguments(seed), temperature=0.7) for seed in (11, 12)]
    plain = vllm.SamplingParams()
    validate = build_custom_logits_processors_params_validator([CLASS])
    for each in (*params, plain):
        validate(each)
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="A guided request carries"):
        validate(vllm.SamplingParams(extra_args={"coin_seed": 1}))
    assert processor.add_request(5, params[0])
    assert processor.add_request(2, params[1])
    assert not processor.add_request(0, plain)
    processor.add_request(3, params[0])
    assert not processor.add_request(3, plain)  # the slot has another request now

    drafts = [(5, position) for position in range(6, 18)]
    rows = [(2, 9), (0, 4), *drafts, (3, 1)]  # slot, position of the token that was read
    slots, read = zip(*rows, strict=True)
    context = SimpleNamespace(
        expanded_idx_mapping=torch.tensor(slots), pos=torch.tensor(read), idx_mapping_np=np.array([2, 0, 5, 3])
    )
    logits = torch.randn(len(rows), 8) * 2
    out = processor.apply(logits.clone(), context)
    for row, (slot, position) in enumerate(rows):
        expected = logits[row : row + 1]
        if slot in (2, 5):
            seed = torch.tensor([12 if slot == 2 else 11])
            expected = coin.flip(expected, 0.7, seed, torch.tensor([position + 1]))
        assert torch.equal(out[row : row + 1], expected)
    heads = (out[2:-1, 7] == 0).sum().item()
    assert 0 < heads < len(drafts)
    nobody = SimpleNamespace(idx_mapping_np=np.array([0, 3]))  # nothing else is read
    assert torch.equal(processor.apply(logits.clone(), nobody), logits)


def test_another_vllm_is_refused(monkeypatch):
    check_version()
    for version in ("0.21.3", "0.32.0", "1.0.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(ImportError, match=rf"need vllm >= 0\.22 and <= 0\.31\.\*, got {version}\. Install one of"):
            check_version()


# ---- The quickstart's models -----------------------------------------------------------------------------------------------------------


def test_models_whose_every_id_is_a_token():
    """Padding is the sentinel, which the policy hardly ever draws: the reference, which has it in the law, differs by some p log p."""
    models = [AutoModelForCausalLM.from_pretrained(name) for name in (POLICY, EXPERT)]
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    prompts = [tokenizer(text).input_ids for text in path_dataset(8)["prompt"]] * 8
    guidance = Guidance(threshold=1.0, vocab_size=45)
    rollout = sample(engine_of(POLICY), models, guidance, prompts, 26, eos=[1], sentinel=0)
    assert_recorded(rollout, *models, prompts, guidance, tolerance=1e-3)
    assert 0.2 < rollout.expert_forwards / rollout.num_tokens < 0.8
