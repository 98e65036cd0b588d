"""Expert and policy behind a real `vllm serve`, which may run in an environment of its own: VLLM names the program, if it is not in the path."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines.vllm_on_cpu import use_small_engines
from tests.sampling.reference import Guidance, assert_recorded, enumerated_law
from tests.sampling.test_law import assert_follows
from tests.test_server_training import Watched, logged
from tests.training import EXPERT, POLICY, filler_reward, length_reward, make_trainer, path_dataset
from trl_selective.engines.coin import Coin
from trl_selective.engines.engine import CLASS, ServedEngine
from trl_selective.engines.sampler import VllmCoinSampler
from trl_selective.experts import ExpertServer, ExpertServerError, completion_logps, connect_expert
from trl_selective.sampling import RemoteCoinSampler

ROOT = Path(__file__).parents[1]
PROGRAM = os.environ.get("VLLM") or shutil.which("vllm")
NAME = "grid-expert"
GUIDANCE = Guidance(threshold=2.0, temperature=0.9, vocab_size=45)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROGRAM is None, reason="no `vllm` in the path, and none named by VLLM"),
]


class Serve:
    """`vllm serve` of a model of the quickstart on a port of this machine."""

    def __init__(self, log, model=EXPERT, name=NAME, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.url, self.log, self.process = f"{self.address}/v1", log, None
        where = ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
        small = [
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "64",
            "--kv-cache-memory-bytes",
            str(2**26),
        ]
        self.command = [PROGRAM, "serve", model, *where, *small, *arguments]

    def start(self):
        """Start, and wait until it answers."""
        environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ROOT)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while True:
            try:
                with urlopen(f"{self.url}/models", timeout=5):
                    return self
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(1)

    def kill(self):
        """With all its children."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Expert and policy; the policy as TRL's documentation starts it, and with coins."""
    folder = tmp_path_factory.mktemp("vllm")
    flags = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--logits-processors", CLASS]
    both = Serve(folder / "expert"), Serve(folder / "policy", POLICY, "grid-policy", *flags)
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Serve.start, both))
        yield both
    finally:
        for server in both:
            if server.process is not None and server.process.poll() is None:
                server.kill()


@pytest.fixture(scope="module")
def serve(servers):
    return servers[0]


@pytest.fixture(scope="module")
def policy_serve(servers):
    return servers[1]


@pytest.fixture(scope="module")
def models():
    return [AutoModelForCausalLM.from_pretrained(name) for name in (POLICY, EXPERT)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY)


def connect(serve, tokenizer, **changes) -> ExpertServer:
    settings = {"expert_tokenizer": None, "max_completion_length": 26, "temperature": 1.0}
    settings |= {"eos_token_ids": [tokenizer.eos_token_id]} | changes
    return connect_expert(serve.url, NAME, tokenizer, **settings)


def test_completions_follow_the_mixture(serve, models, tokenizer):
    """A prompt behind which the next move is open."""
    prompt = tokenizer(path_dataset(1)["prompt"][0]).input_ids
    sampler = RemoteCoinSampler(models[0], connect(serve, tokenizer))
    settings = {"max_completion_length": 2, "eos_token_ids": [tokenizer.eos_token_id], "temperature": 0.9}
    rollout = sampler.sample([prompt] * 1500, entropy_threshold=GUIDANCE.threshold, **settings)
    counts = Counter(map(tuple, rollout.completion_ids))
    assert_follows(counts, enumerated_law(*models, prompt, 2, [tokenizer.eos_token_id], GUIDANCE))
    for other in (Guidance("constant", max_weight=0.0, vocab_size=45), Guidance("constant", vocab_size=45)):
        with pytest.raises(AssertionError):
            assert_follows(counts, enumerated_law(*models, prompt, 2, [tokenizer.eos_token_id], other))
    weights = torch.tensor([weight for row in rollout.guidance_weights for weight in row])
    deviation = (weights * (1 - weights)).sum().sqrt().item()
    assert abs(rollout.expert_forwards - weights.sum().item()) < 4 * deviation


def test_it_scores_as_the_model_does(serve, models, tokenizer):
    prompts = [tokenizer(text).input_ids for text in path_dataset(4)["prompt"][:]]
    completions = [[38, 38, 40, tokenizer.eos_token_id], [5], [40, 38], list(range(2, 20))]
    scored = connect(serve, tokenizer).completion_logps(prompts, completions)
    for ours, theirs in zip(scored, completion_logps(models[1], prompts, completions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused(serve, tokenizer):
    larger = AutoTokenizer.from_pretrained(POLICY)
    larger.add_tokens(["<more>"])
    with pytest.raises(ExpertServerError, match="Token-level guidance needs one vocabulary"):
        connect(serve, larger)
    padded = AutoTokenizer.from_pretrained(POLICY)
    padded.get_vocab = lambda: {**tokenizer.get_vocab(), "<more>": 45}
    with pytest.raises(ExpertServerError, match=r"contain out-of-vocab token ids\. Vocabulary size: 45"):
        connect(serve, padded)
    with pytest.raises(ExpertServerError, match=r"takes texts of 64 tokens, but .* max_completion_length=64"):
        connect(serve, tokenizer, max_completion_length=64)
    with pytest.raises(ExpertServerError, match=r"temperature must be in \[0, 2\], got 3"):
        connect(serve, tokenizer, temperature=3.0)
    text = [*tokenizer(path_dataset(1)["prompt"][0]).input_ids, 38]
    expert = connect(serve, tokenizer, eos_token_ids=[0])
    with pytest.raises(ExpertServerError, match=r"ends its answers with token 1, but the policy ends with \[0\] only"):
        expert.draw([text] * 400, list(range(400)), 2.0)


# ---- The policy behind a server --------------------------------------------------------------------------------------------------------

COIN = Coin("entropy", 0.0, 1.0, 45, 0)  # its head has no id to spare: padding says heads
WITHOUT_PADDING = (
    1e-3  # which the policy draws with a probability of some 1e-5, is left out of its law, and not of the reference's
)


@pytest.mark.parametrize("is_served", [False, True], ids=["local_expert", "served_expert"])
def test_a_served_policy_follows_the_mixture(policy_serve, serve, models, tokenizer, is_served):
    prompt, ends = tokenizer(path_dataset(1)["prompt"][0]).input_ids, [tokenizer.eos_token_id]
    expert = connect(serve, tokenizer) if is_served else models[1]
    sampler = VllmCoinSampler(ServedEngine(policy_serve.address), models[0], expert, COIN)
    settings = {"max_completion_length": 3, "eos_token_ids": ends, "temperature": 0.9}
    rollout = sampler.sample([prompt] * 700, entropy_threshold=GUIDANCE.threshold, **settings)
    counts = Counter(map(tuple, rollout.completion_ids))
    assert_follows(counts, enumerated_law(*models, prompt, 3, ends, GUIDANCE))
    for other in (Guidance("constant", max_weight=0.0, vocab_size=45), Guidance("constant", vocab_size=45)):
        with pytest.raises(AssertionError):
            assert_follows(counts, enumerated_law(*models, prompt, 3, ends, other))
    if rollout.is_scored:
        assert_recorded(rollout, *models, [prompt] * 700, GUIDANCE, tolerance=WITHOUT_PADDING)


def test_policy_and_expert_behind_servers(policy_serve, serve, models, tokenizer):
    prompts, ends = [tokenizer(text).input_ids for text in path_dataset(48)["prompt"]], [tokenizer.eos_token_id]
    sampler = VllmCoinSampler(
        ServedEngine(policy_serve.address), models[0], connect(serve, tokenizer, scores=True), COIN
    )
    settings = {"max_completion_length": 26, "eos_token_ids": ends}
    rollout = sampler.sample(prompts, entropy_threshold=2.0, **settings)
    assert_recorded(rollout, *models, prompts, Guidance(threshold=2.0, vocab_size=45), WITHOUT_PADDING)
    weights = torch.tensor([weight for row in rollout.guidance_weights for weight in row])
    deviation = (weights * (1 - weights)).sum().sqrt().item()
    assert abs(rollout.expert_forwards - weights.sum().item()) < 4 * deviation


def test_a_server_that_flips_no_coins_is_refused(serve, models):
    with pytest.raises(
        ValueError, match=r"does not guide: .* Start it with `--logits-processors trl_selective\.engines"
    ):
        VllmCoinSampler(ServedEngine(serve.address), *models, COIN)


def test_half_a_coin_is_a_request_that_fails(policy_serve):
    engine = ServedEngine(policy_serve.address)
    body = {"model": "grid-policy", "prompt": [2], "extra_body": {"vllm_xargs": {"coin_seed": 1}}}
    with pytest.raises(
        RuntimeError, match=r"BadRequestError: .*A guided request carries .*Expected `vllm serve` with"
    ):
        engine._ask(lambda: engine._client.completions.create(**body))


def test_training_in_server_mode(policy_serve, tmp_path, monkeypatch):
    """All but how weights get there, for which TRL needs a GPU: here they go by way of a folder."""
    from trl.generation import vllm_generation

    def sync_weights(generation):
        generation.model.save_pretrained(tmp_path / "weights")
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "weights")}}
        for path, body in (("collective_rpc", json.dumps(rpc).encode()), ("reset_prefix_cache", b"")):
            headers = {"Content-Type": "application/json"}
            urlopen(Request(f"{policy_serve.address}/{path}", body, headers, method="POST")).close()

    monkeypatch.setattr(vllm_generation.VLLMClient, "init_communicator", lambda *args, **kwargs: None)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", sync_weights)
    trainer = make_trainer(
        tmp_path,
        trainer_class=Watched,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=policy_serve.address,
        guided_sampler="auto",
        reward_funcs=length_reward,
        learning_rate=1e-2,
        max_steps=2,
    )
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3  # also behind the first update
    for batch, output in zip(trainer.batches, trainer.outputs, strict=True):
        guided = output["is_guided"]
        assert (output["importance_sampling_ratio"][guided] == 1).all()
        assert batch.rollout.is_scored
        weights = torch.tensor([weight for row in batch.rollout.guidance_weights for weight in row])
        deviation = (weights * (1 - weights)).sum().sqrt().item()
        assert abs(batch.rollout.expert_forwards - weights.sum().item()) < 4 * deviation


# ---- Trouble ---------------------------------------------------------------------------------------------------------------------------


def test_training_outlives_a_killed_server(serve, tmp_path, monkeypatch):
    """Also with a policy that vLLM samples in this process, where it is installed beside the tests."""
    run = {
        "expert_model": NAME,
        "expert_model_server_url": serve.url,
        "expert_model_server_patience": 2.0,
        "guided_sampler": "auto",
        "guided_importance_correction": "token_truncate",
        "reward_funcs": filler_reward,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    kinds = {"transformers": run}
    if find_spec("vllm") is not None:
        use_small_engines(monkeypatch)
        kinds["vllm"] = {**run, "use_vllm": True, "vllm_mode": "colocate"}
    broken = {}
    for kind, settings in kinds.items():
        trainer = make_trainer(tmp_path / kind, **settings, max_steps=2)
        trainer.train()
        assert trainer.state.log_history[0]["guidance/reward/guided"] > 0
        broken[kind] = make_trainer(tmp_path / kind, **settings, max_steps=4)
    serve.kill()
    for kind, trainer in broken.items():
        with pytest.raises(
            ExpertServerError, match=rf"(?s)patience=2 seconds.* from its last checkpoint, with .*{kind}/checkpoint-2'"
        ):
            trainer.train(resume_from_checkpoint=True)
    serve.start()
    for kind, settings in kinds.items():
        resumed = make_trainer(tmp_path / kind, **settings, max_steps=4)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 4
