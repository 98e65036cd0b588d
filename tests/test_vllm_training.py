"""Training whose rollouts are drawn by vLLM in this process, through the front door."""

import os
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.endpoint import VllmEndpoint
from tests.engines.vllm_on_cpu import use_small_engines
from tests.test_server_training import Watched, logged, serving
from tests.test_shared_base import shared
from tests.training import (
    EXPERT,
    INJECTED,
    PLAIN,
    POLICY,
    expert_dataset,
    filler_reward,
    length_reward,
    make_trainer,
    path_dataset,
)
from trl_selective.experts import ExpertServerError, completion_logps

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

VLLM = {
    "use_vllm": True,
    "vllm_mode": "colocate",
    "guided_sampler": "auto",
    "reward_funcs": length_reward,
    "trainer_class": Watched,
}
GUIDED = {**VLLM, "max_steps": 2}


@pytest.fixture(autouse=True)
def small_engines(monkeypatch):
    use_small_engines(monkeypatch)


@pytest.fixture(scope="module")
def expert():
    return AutoModelForCausalLM.from_pretrained(EXPERT)


def guided_texts(trainer, batch):
    """Prompts and completions of the guided rows."""
    prompts = [trainer.processing_class(batch.rows[row]["prompt"]).input_ids for row in batch.guided_rows]
    return prompts, batch.rollout.completion_ids


def test_two_guided_steps(tmp_path, expert, monkeypatch):
    """The engine has the weights of each step; the record is theirs; TRL's ratio is 1 on guided rows and its own on the others."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    trainer = make_trainer(tmp_path, **GUIDED, learning_rate=1e-2, guided_importance_correction="token_truncate")
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"  # the runner of the first generation, unless the user chooses
    start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3  # also behind the first update
    for batch, output in zip(trainer.batches, trainer.outputs, strict=True):
        guided = output["is_guided"]
        assert guided.tolist() == batch.is_guided
        assert (output["importance_sampling_ratio"][guided] == 1).all()
        assert (output["importance_sampling_ratio"][~guided] - 1).abs().max() < 1e-2
        assert (output["importance_sampling_ratio"][~guided] != 1).any()
        assert output["sampling_per_token_logps"][guided].isnan().any()
        assert batch.rollout.is_scored
        for row, ids in zip(batch.guided_rows, batch.rollout.completion_ids, strict=True):
            assert output["completion_ids"][row][: len(ids)].tolist() == ids
        assert_recorded(trainer, batch, output, expert)


def assert_recorded(trainer, batch, output, expert):
    """The record of guided rows is that of the policy before its update, which the loss took as old, and of the expert."""
    prompts, completions = guided_texts(trainer, batch)
    scored = completion_logps(expert, prompts, completions)
    for number, row in enumerate(batch.guided_rows):
        length = len(completions[number])
        policy = torch.tensor(batch.rollout.policy_per_token_logps[number])
        torch.testing.assert_close(policy, output["old_per_token_logps"][row, :length], rtol=0, atol=2e-4)
        weight = torch.tensor(batch.rollout.guidance_weights[number])
        mixed = (1 - weight) * policy.exp() + weight * scored[number].exp()
        ours = torch.tensor(batch.rollout.sampling_per_token_logps[number])
        torch.testing.assert_close(ours, mixed.log(), rtol=0, atol=2e-4)
        advantages = output["advantages"][row, :length]  # with the weight pi_theta / pi_mix
        ratio = policy.exp() / mixed
        torch.testing.assert_close(advantages, advantages[0] / ratio[0] * ratio, rtol=1e-3, atol=1e-5)


def test_an_adapter_that_its_base_guides(tmp_path):
    """The engine gets the merged weights of each step, while the expert stays the base."""
    trainer = shared(tmp_path, **GUIDED, learning_rate=1e-1, guided_importance_correction="token_truncate")
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    base = AutoModelForCausalLM.from_pretrained(POLICY)
    for batch, output in zip(trainer.batches, trainer.outputs, strict=True):
        assert_recorded(trainer, batch, output, base)
    ratios = [ratio.abs().max().item() for ratio in trainer.batches[-1].rollout.log_ratios()]
    assert max(ratios) > 0.01  # by then the policy is another one


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_without_a_correction_guided_tokens_count_as_they_are(tmp_path, mode):
    trainer = make_trainer(tmp_path, **{**GUIDED, "max_steps": 1}, vllm_importance_sampling_mode=mode)
    trainer.train()
    (output,) = trainer.outputs
    assert (output["importance_sampling_ratio"][output["is_guided"]] == 1).all()
    assert output["advantages"].dim() == 1
    weight, asked = logged(trainer, "guidance/weight"), logged(trainer, "guidance/expert_forwards_per_token")
    assert 0.05 < weight[0] < 0.95
    assert asked[0] == pytest.approx(weight[0], abs=0.15)


def test_with_w_1_completions_are_the_experts(tmp_path, expert):
    """Only the expert uses the filler word."""
    trainer = make_trainer(
        tmp_path,
        **{**GUIDED, "reward_funcs": filler_reward},
        guidance_weighting="constant",
        entropy_threshold_init=None,
    )
    trainer.train()
    assert logged(trainer, "guidance/expert_forwards_per_token") == [1.0] * 2
    assert min(logged(trainer, "guidance/reward/guided")) > 0.3
    assert logged(trainer, "guidance/reward/on_policy")[0] < 0.1  # before the policy has learnt it


def test_on_policy_rows_end_where_guided_ones_do(tmp_path):
    """At an end token that was set here, which the engine does not find beside the weights. Without it, a row has several of them."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.eos_token = "D"
    trainer = make_trainer(tmp_path, **{**GUIDED, "max_steps": 1}, init={"processing_class": tokenizer})
    trainer.train()
    assert len(trainer.eos_token_ids) == 2
    (batch,) = trainer.batches
    assert not any(set(trainer.eos_token_ids) & set(ids[:-1]) for ids in batch.completion_ids)
    for rows in batch.split(batch.completion_ids):
        assert tokenizer.eos_token_id in {ids[-1] for ids in rows}


def test_evaluation_is_not_guided(tmp_path):
    """With an expert that always steps in, evaluation still has none of its filler words."""
    trainer = make_trainer(
        tmp_path,
        **{**GUIDED, "max_steps": 1, "reward_funcs": filler_reward},
        guidance_weighting="constant",
        entropy_threshold_init=None,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=16,
        init={"eval_dataset": path_dataset(8)},
    )
    requests = watch_requests(trainer)
    trainer.train()
    assert logged(trainer, "eval_reward")[0] < 0.1 < 0.3 < logged(trainer, "guidance/reward/guided")[0]
    carried = [bool(params.extra_args) for params in requests]
    assert carried.count(False) == 8 + 8 * trainer.num_generations_eval  # on-policy rows of the step, and evaluation


def watch_requests(trainer) -> list:
    """The parameters of all requests to its engine, as they come."""
    engine, requests = trainer.vllm_generation.llm.llm_engine, []
    add = engine.add_request

    def watched(name, prompt, params, *args, **kwargs):
        requests.append(params)
        return add(name, prompt, params, *args, **kwargs)

    engine.add_request = watched
    return requests


@pytest.mark.parametrize("settings", [PLAIN, INJECTED], ids=["off", "injected"])
def test_without_guided_rollouts_the_engine_is_trls(tmp_path, settings, monkeypatch):
    """No processor of ours is in it, and the choice of its runner is vLLM's; injected rows have the ratio 1, since the engine has not drawn them."""
    changes = {**VLLM, "guided_sampler": None, "settings": settings, "max_steps": 2}
    if settings is INJECTED:
        changes |= {"train_dataset": expert_dataset(), "injection_trigger": "always", "injection_advantage": "group"}
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    trainer = make_trainer(tmp_path, **changes)
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ
    requests = watch_requests(trainer)
    config = trainer.vllm_generation.llm.llm_engine.model_config
    assert not config.logits_processors
    trainer.train()
    assert trainer.state.global_step == 2
    assert not any(params.extra_args for params in requests)
    for output in trainer.outputs:
        rows = output["is_injected"]
        assert rows.sum() == 4
        assert (output["importance_sampling_ratio"][rows] == 1).all()
        assert (output["importance_sampling_ratio"][~rows] != 1).any()
    assert len(trainer.outputs) == (2 if settings is INJECTED else 0)


def test_guided_and_injected_rows_together(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **GUIDED,
        num_generations=8,
        num_injected_completions=1,
        injection_trigger="always",
        injection_advantage="group",
        train_dataset=expert_dataset(),
    )
    trainer.train()
    for output in trainer.outputs:
        assert output["is_injected"].sum() == 2
        assert not (output["is_injected"] & output["is_guided"]).any()
        assert (output["importance_sampling_ratio"][output["is_injected"] | output["is_guided"]] == 1).all()


def test_an_expert_server_that_goes_down_within_a_rollout(tmp_path, expert):
    """The documented error with the last checkpoint, and nothing is left in the engine."""
    run = {
        "save_strategy": "steps",
        "save_steps": 1,
        "expert_model_server_patience": 0.5,
        "expert_model": VllmEndpoint.name,
    }
    endpoint = serving(expert).__enter__()
    trainer = make_trainer(tmp_path, **GUIDED, **run, expert_model_server_url=endpoint.url)
    answered = []

    def trouble(number, headers):
        answered.append(trainer.state.global_step)
        return (503, {}, "{}") if answered.count(1) > 20 else None

    endpoint.trouble = trouble
    with pytest.raises(
        ExpertServerError,
        match=r"(?s)expert_model_server_patience=0\.5 seconds.* last checkpoint, with .*checkpoint-1'",
    ):
        trainer.train()
    assert logged(trainer, "guidance/expert_forwards_per_token")[0] > 0
    assert trainer.state.global_step == 1
    assert not trainer.vllm_generation.llm.llm_engine.has_unfinished_requests()
    endpoint.__exit__()


def test_a_policy_without_a_free_id_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="Guided rollouts with vLLM need a token that no completion contains"):
        make_trainer(tmp_path, **GUIDED, init={"processing_class": tokenizer})
