"""Guided training with the expert behind a server, through the front door."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tests.endpoint import VllmEndpoint
from tests.training import EXPERT, INJECTED, QUICKSTART, expert_dataset, filler_reward, length_reward, make_trainer
from trl_selective import SelectiveGuidanceGRPOTrainer
from trl_selective.experts import ExpertServerError, completion_logps

NAME = VllmEndpoint.name
TOO_FEW = {"per_device_train_batch_size": 8, "guided_sampler": "coin"}  # rows for tests that do not look at them


@pytest.fixture(scope="module")
def expert():
    return AutoModelForCausalLM.from_pretrained(EXPERT)


@pytest.fixture
def endpoint(expert):
    with serving(expert) as endpoint:
        yield endpoint


def serving(expert, port: int = 0) -> VllmEndpoint:
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    return VllmEndpoint(expert, lambda text: tokenizer(text).input_ids, port=port)


def server_trainer(folder, endpoint, **changes):
    changes = {"guided_sampler": "auto", "expert_model": NAME, "reward_funcs": length_reward, **changes}
    return make_trainer(folder, expert_model_server_url=endpoint.url, **changes)


class Watched(SelectiveGuidanceGRPOTrainer):
    def __init__(self, *args, **kwargs):
        self.batches, self.outputs = [], []
        super().__init__(*args, **kwargs)

    def _apply_guidance(self, output, batch):
        self.batches.append(batch)
        self.outputs.append(dict(super()._apply_guidance(output, batch)))
        return dict(self.outputs[-1])


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same_parameters(first, second):
    return all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())


# ---- Consequences ----------------------------------------------------------------------------------------------------------------------


def test_with_w_1_completions_are_the_experts(tmp_path, endpoint, expert):
    """Only the expert uses the filler word. What the server drew is what the trainer scored."""
    trainer = server_trainer(
        tmp_path,
        endpoint,
        trainer_class=Watched,
        reward_funcs=filler_reward,
        guidance_weighting="constant",
        entropy_threshold_init=None,
    )
    endpoint.requests.clear()
    trainer.train()
    assert trainer.state.global_step == 3
    rollouts = [batch.rollout for batch in trainer.batches]
    assert len(endpoint.requests) == sum(rollout.num_tokens for rollout in rollouts)
    assert all(all(row) for rollout in rollouts for row in rollout.expert_drawn)
    assert logged(trainer, "guidance/expert_forwards_per_token") == [1.0] * 3
    assert min(logged(trainer, "guidance/reward/guided")) > 0.3
    assert max(logged(trainer, "guidance/reward/on_policy")) < 0.1
    # they are likely under the expert, as its own answers are: about its entropy a token
    prompts = [body["prompt"] for _, body in endpoint.requests]
    texts = {tuple(text) for text in prompts}
    for batch in trainer.batches:
        for row, ids in zip(batch.guided_rows, batch.rollout.completion_ids, strict=True):
            prompt = trainer.processing_class(batch.rows[row]["prompt"]).input_ids
            assert {(*prompt, *ids[:position]) for position in range(len(ids))} <= texts
            assert completion_logps(expert, [prompt], [ids])[0].mean() > -1.5


@pytest.mark.parametrize("mixture_policy", ["current", "initial"])
def test_without_scores_no_ratio_is_logged(tmp_path, endpoint, mixture_policy):
    trainer = server_trainer(tmp_path, endpoint, mixture_policy=mixture_policy, max_steps=1, temperature=0.8)
    trainer.train()
    (weight,), (asked,) = logged(trainer, "guidance/weight"), logged(trainer, "guidance/expert_forwards_per_token")
    assert 0.05 < weight < 0.95
    assert asked == pytest.approx(weight, abs=0.15)
    assert logged(trainer, "guidance/expert_drawn") == [asked]
    assert not logged(trainer, "guidance/importance_ratio/mean")
    assert {body["temperature"] for _, body in endpoint.requests[2:]} == {0.8}


def test_a_correction_has_the_experts_probabilities(tmp_path, endpoint, expert):
    trainer = server_trainer(
        tmp_path, endpoint, trainer_class=Watched, max_steps=1, guided_importance_correction="token_truncate"
    )
    trainer.train()
    (batch,), (output,) = trainer.batches, trainer.outputs
    assert batch.rollout.is_scored
    prompts = [trainer.processing_class(batch.rows[row]["prompt"]).input_ids for row in batch.guided_rows]
    scored = completion_logps(expert, prompts, batch.rollout.completion_ids)
    for row, expert_logps in enumerate(scored):
        weight = torch.tensor(batch.rollout.guidance_weights[row])
        policy = torch.tensor(batch.rollout.policy_per_token_logps[row]).exp()
        mixed = (1 - weight) * policy + weight * expert_logps.exp()
        ours = torch.tensor(batch.rollout.sampling_per_token_logps[row])
        torch.testing.assert_close(ours, mixed.log(), rtol=0, atol=1e-4)
        advantages = output["advantages"][batch.guided_rows[row], : len(ours)]
        scale = advantages[0] / (policy[0] / mixed[0])  # the weight is pi_theta / pi_mix
        torch.testing.assert_close(advantages, scale * policy / mixed, rtol=1e-3, atol=1e-5)
    assert logged(trainer, "guidance/importance_ratio/mean")[0] == pytest.approx(1.0, abs=0.25)  # E_mix[pi / mix] = 1


def test_the_server_scores_injected_completions(tmp_path, endpoint, expert):
    trainer = server_trainer(
        tmp_path,
        endpoint,
        trainer_class=Watched,
        settings=INJECTED,
        guided_sampler=None,
        injection_correction="truncated",
        injection_trigger="always",
        injection_advantage="group",
        train_dataset=expert_dataset(),
        expert_model_name_or_path=NAME,
        max_steps=1,
    )
    trainer.train()
    (batch,), (output,) = trainer.batches, trainer.outputs
    injected = batch.injected(0)
    assert len(injected) == 4
    for row, choice in injected.items():
        prompt = trainer.processing_class(batch.rows[row]["prompt"]).input_ids
        (expected,) = completion_logps(expert, [prompt], [choice.completion.token_ids])
        ours = output["behaviour_per_token_logps"][row, : len(expected)]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


# ---- Trouble ---------------------------------------------------------------------------------------------------------------------------


class Breakdown(TrainerCallback):
    """The server goes down once the second step is done."""

    def __init__(self, endpoint):
        self.endpoint = endpoint

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.endpoint.__exit__()


def test_a_server_that_dies_stops_training_which_resumes_as_if_nothing_had_been(tmp_path, expert):
    run = {"save_strategy": "steps", "save_steps": 1, "expert_model_server_patience": 0.5, **TOO_FEW}
    endpoint = serving(expert).__enter__()
    trainer = server_trainer(tmp_path / "broken", endpoint, init={"callbacks": [Breakdown(endpoint)]}, **run)
    message = (
        rf"The expert '{NAME}' behind {re.escape(endpoint.url)} does not answer as it should: APIConnectionError: Connection error. .*"
        rf"expert_model_server_patience=0.5 seconds[^\n]*\nTraining has stopped at step 2\. Once this is mended, start it from its last checkpoint, "
        rf"with resume_from_checkpoint='{tmp_path}/broken/checkpoint-2'"
    )
    started = time.monotonic()
    with pytest.raises(ExpertServerError, match=message):
        trainer.train()
    assert time.monotonic() - started < 30
    assert trainer.state.global_step == 2

    with serving(expert, endpoint.server.server_port) as endpoint:
        resumed = server_trainer(tmp_path / "broken", endpoint, **run)
        resumed.train(resume_from_checkpoint=True)
        whole = server_trainer(tmp_path / "whole", endpoint, **run)
        whole.train()
    assert resumed.state.global_step == 3
    assert same_parameters(resumed.model, whole.model)  # the seeds of the requests, too, come out of the checkpoint
    assert not same_parameters(resumed.model, trainer.model)


def test_the_key_is_in_nothing_that_is_saved_or_shown(tmp_path, endpoint, monkeypatch, capfd, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    caplog.set_level("DEBUG")
    keys = set()
    endpoint.trouble = lambda number, headers: keys.add(headers["Authorization"])
    trainer = server_trainer(
        tmp_path, endpoint, max_steps=1, save_strategy="steps", save_steps=1, preset="mentor", **TOO_FEW
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    trainer.save_state()
    trainer.create_model_card()
    assert keys == {"Bearer sk-secret"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"README.md", "trainer_state.json", "training_args.bin"} <= {path.name for path in files}
    assert not any(b"sk-secret" in path.read_bytes() for path in files)
    assert "sk-secret" not in "".join(capfd.readouterr()) + caplog.text
    assert "sk-secret" not in repr(trainer.args) + json.dumps(trainer.args.to_dict(), default=str)


# ---- At the start ----------------------------------------------------------------------------------------------------------------------


def test_the_expert_is_given_by_name(tmp_path, endpoint, expert):
    assert (
        server_trainer(tmp_path, endpoint, expert_model=None, expert_model_name_or_path=NAME).expert_model.name == NAME
    )


TWO = """
import sys
from tests.test_server_training import server_trainer, NAME
class Place: url = sys.argv[2]
trainer = server_trainer(sys.argv[1], Place, max_steps=2, guidance_weighting="constant", per_device_train_batch_size=8)
trainer.train()
asked = sum(trainer.state.log_history[i]["guidance/expert_forwards_per_token"] for i in (0, 1))
print(f"asked {asked}\\n", end="", flush=True)  # in one piece, though both write to one pipe
"""


@pytest.mark.slow
def test_each_process_asks_by_itself(tmp_path, endpoint):
    script = tmp_path / "run.py"
    script.write_text(TWO)
    environment = {**os.environ, "PYTHONPATH": str(QUICKSTART.parents[1]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "out"), endpoint.url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("asked 2.0") == 2
    assert sum(path == "/v1/models" for path, _ in endpoint.requests) == 2
