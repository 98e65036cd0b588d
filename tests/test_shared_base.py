"""Adapters that are trained while their own base model guides, or another adapter on it: through the front door, and what follows from it."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.test_trainer import Watched, logged
from tests.training import (
    INJECTED,
    POLICY,
    QUICKSTART,
    expert_dataset,
    length_reward,
    make_trainer,
    path_dataset,
)

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def shared(folder, *, lora=None, **changes):
    """A trainer of a fresh adapter on the quickstart's policy, guided by the base; `expert_model` names another adapter."""
    init = {"peft_config": LoraConfig(**LORA, **(lora or {}))} | changes.pop("init", {})
    settings = {
        "trainer_class": Watched,
        "expert_model": None,
        "expert_model_shares_base": True,
        "reward_funcs": length_reward,
    }
    return make_trainer(folder, **{**settings, **changes}, init=init)  # fmt: skip


def save_adapter(folder, model=POLICY, **changes):
    """An adapter that matters, with its base's tokenizer unless told otherwise."""
    torch.manual_seed(7)
    lora = LoraConfig(**{**LORA, "init_lora_weights": False, **changes})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    adapted.save_pretrained(folder)
    return str(folder)


def live_models():
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, PreTrainedModel)]


def ids_of(tensors):
    return {id(tensor) for tensor in tensors}


@pytest.mark.parametrize(
    ("sampler", "bf16"), [("stepwise", True), ("stepwise", False), ("coin", False), ("speculative", False)]
)
def test_a_fresh_adapter_equals_its_base_and_a_trained_one_does_not(tmp_path, sampler, bf16):
    """With B = 0 pi_mix = pi_theta: ratios of 1, no draw by the expert. One update later the two differ."""
    trainer = shared(
        tmp_path, max_steps=2, guided_sampler=sampler, bf16=bf16, guidance_weighting="constant", guidance_weight_max=0.5,
        learning_rate=3e-2, gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    first, second = (batch.rollout for batch in trainer.batches)
    assert not any(map(any, first.expert_drawn))
    assert torch.cat(first.log_ratios()).abs().max() < 1e-6
    assert logged(trainer, "guidance/importance_ratio/mean")[0] == pytest.approx(1.0, abs=1e-6)
    assert any(map(any, second.expert_drawn))
    assert torch.cat(second.log_ratios()).abs().max() > 1e-2


def test_a_new_adapter_is_warned_of_a_base_that_it_equals(tmp_path):
    problem = "the expert changes no token until training has moved the policy"
    with pytest.warns(UserWarning, match=problem):
        shared(tmp_path / "base")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        shared(tmp_path / "adapter", expert_model=save_adapter(tmp_path / "expert"))
    assert not any(problem in str(warning.message) for warning in found)


def test_an_adapter_that_truncates_its_base_is_refused(tmp_path):
    if not hasattr(peft, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    with pytest.raises(ValueError, match=r"The policy's adapter has kasa_config=KasaConfig.*changes the base model"):
        shared(tmp_path, lora={"kasa_config": peft.KasaConfig()})


def test_the_base_has_the_head_of_the_policy(tmp_path):
    """Which TRL can keep in float32 above a policy in bfloat16."""
    options = {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = shared(tmp_path, max_steps=1, **options)
    trainer.train()
    assert trainer.expert_model.lm_head.weight is trainer.model.get_base_model().lm_head.weight
    assert trainer.expert_model(torch.tensor([[3, 9, 20]])).logits.dtype == torch.float32


@pytest.mark.parametrize("adapter", [False, True])
def test_the_base_is_there_once_and_stays_what_it_is(tmp_path, adapter):
    before = AutoModelForCausalLM.from_pretrained(POLICY).state_dict()
    expert = save_adapter(tmp_path / "expert") if adapter else None
    known = live_models()
    trainer = shared(tmp_path / "out", expert_model=expert, learning_rate=1e-2)
    base = {name: p for name, p in trainer.model.named_parameters() if "lora" not in name}
    theirs = {name: p for name, p in trainer.expert_model.named_parameters() if "lora" not in name}
    assert ids_of(theirs.values()) == ids_of(base.values())
    found = [model for model in live_models() if not any(model is old for old in known)]
    tensors = {
        p.data_ptr(): p.numel() for model in found for name, p in model.named_parameters() if "lora" not in name
    }
    assert sum(tensors.values()) == sum(tensor.numel() for tensor in before.values())
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora" in name}
    trainer.train()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace("base_layer.", "")])
    now = dict(trainer.model.named_parameters())
    assert any(not torch.equal(now[name], value) for name, value in trained.items())
    assert not any(p.requires_grad for p in trainer.expert_model.parameters())
    assert {name for name, p in now.items() if p.requires_grad} == set(trained)


@pytest.mark.parametrize("adapter", [False, True])
def test_guidance_follows_the_law_of_a_second_copy(tmp_path, adapter):
    """The record of each token against forwards of models that were loaded afresh."""
    expert = save_adapter(tmp_path / "expert") if adapter else None
    trainer = shared(
        tmp_path / "out", expert_model=expert, lora={"init_lora_weights": False}, max_steps=1, learning_rate=0.0
    )
    trainer.train()
    copy_of_expert = AutoModelForCausalLM.from_pretrained(POLICY)
    if adapter:
        copy_of_expert = PeftModel.from_pretrained(copy_of_expert, expert)
    output, batch = trainer.outputs[0], trainer.batches[0]
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    guided, start = output["is_guided"], output["prompt_ids"].size(1) - 1
    with torch.no_grad():
        laws = [
            model(input_ids=ids[guided], attention_mask=mask[guided]).logits[:, start:-1].double().softmax(-1)
            for model in (trainer.model, copy_of_expert)
        ]
    for row, tokens in enumerate(batch.rollout.completion_ids):
        own, theirs = (law[row, : len(tokens)].gather(1, torch.tensor(tokens)[:, None]).squeeze(1) for law in laws)
        weight = torch.tensor(batch.rollout.guidance_weights[row]).double()
        recorded = torch.tensor(batch.rollout.sampling_per_token_logps[row]).double()
        torch.testing.assert_close(recorded, ((1 - weight) * own + weight * theirs).log(), rtol=0, atol=2e-4)
    assert any(map(any, batch.rollout.expert_drawn))


def test_another_adapter_teaches_as_a_model_of_its_own_does(tmp_path):
    """Bit for bit: the same run with the expert loaded with a base of its own."""
    expert = save_adapter(tmp_path / "expert")
    both = []
    for shares in (True, False):
        torch.manual_seed(0)  # TRL 1.14 does not seed the adapter that it makes
        both.append(shared(tmp_path / str(shares), expert_model=expert, expert_model_shares_base=shares))
        torch.manual_seed(0)  # putting an adapter on a model draws numbers
        both[-1].train()
    one, other = (dict(trainer.model.named_parameters()) for trainer in both)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert both[0].batches[0].rollout.completion_ids == both[1].batches[0].rollout.completion_ids


def test_an_error_while_sampling_leaves_the_policy_as_it_was(tmp_path, monkeypatch):
    trainer = shared(tmp_path, lora={"init_lora_weights": False}, max_steps=1, gradient_checkpointing=True)
    ids = torch.tensor([[3, 9, 20]])
    expected = trainer.model(ids).logits
    modes = [module.training for module in trainer.model.modules()]
    reads = []

    def fail(*args, **kwargs):
        reads.append(args)
        raise RuntimeError("the expert is ill")

    monkeypatch.setattr(trainer.expert_model, "forward", fail)
    with pytest.raises(RuntimeError, match="the expert is ill"):
        trainer.train()
    assert reads
    assert not trainer.model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
    trainer.model.train(modes[0])
    assert torch.equal(trainer.model(ids).logits, expected)
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora" in name)


def test_a_reference_adapter_and_an_initial_policy_go_with_it(tmp_path):
    """`beta` > 0 makes TRL copy a given adapter as its reference; the initial policy is a copy of ours."""
    lora = LoraConfig(**LORA, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(POLICY), lora)
    trainer = shared(tmp_path / "ref", model=model, init={"peft_config": None}, beta=0.1, mixture_policy="initial")
    trainer.train()
    assert len(trainer.batches) == 3
    assert math.isfinite(logged(trainer, "kl")[-1])
    assert trainer._sampler.policy is not trainer.model
    assert trainer.expert_model.training is False


def test_checkpoints_hold_the_adapter_alone_and_resume(tmp_path):
    """From step 2 of 3 to the parameters of the unbroken run, bit for bit."""
    expert = save_adapter(tmp_path / "expert")
    run = {"expert_model": expert, "save_strategy": "steps", "save_steps": 2}
    whole = shared(tmp_path / "whole", **run)
    whole.train()
    whole.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "whole" / "checkpoint-2", tmp_path / "final"):
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert [name for name in names if name.endswith("safetensors")] == ["adapter_model.safetensors"]
        assert {key.split(".")[-2] for key in load_file(folder / "adapter_model.safetensors")} == {"lora_A", "lora_B"}
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = shared(tmp_path / "resumed", **run)
    resumed.train(resume_from_checkpoint=True)
    now, then = (dict(trainer.model.named_parameters()) for trainer in (resumed, whole))
    assert all(torch.equal(now[name], then[name]) for name in then)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), tmp_path / "final").eval()
    ids = torch.tensor([[3, 9, 20]])
    torch.testing.assert_close(loaded(ids).logits, whole.model.eval()(ids).logits)


def test_injected_completions_are_scored_by_the_base(tmp_path):
    """pi_b of `truncated` is the base's: with a fresh adapter the policy's own, so that every ratio is 1."""
    trainer = shared(
        tmp_path, settings=INJECTED, injection_correction="truncated", injection_advantage="group", max_steps=1,
        train_dataset=expert_dataset(16), num_injected_completions=1,
    )  # fmt: skip
    trainer.train()
    output = trainer.outputs[0]
    selected = output["completion_mask"].bool() & output["is_injected"].unsqueeze(1)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    logits = AutoModelForCausalLM.from_pretrained(POLICY)(input_ids=ids, attention_mask=mask).logits
    logps = logits[:, output["prompt_ids"].size(1) - 1 : -1].log_softmax(-1)
    expected = logps.gather(-1, output["completion_ids"].unsqueeze(-1)).squeeze(-1)
    assert selected.any()
    torch.testing.assert_close(output["behaviour_per_token_logps"][selected], expected[selected], rtol=0, atol=2e-4)


# ---- Errors before training ------------------------------------------------------------------------------------------------------------


# ---- The command line ------------------------------------------------------------------------------------------------------------------


def test_the_script_trains_an_adapter_that_its_base_guides(tmp_path):
    """`--use_peft --expert_model_shares_base`, and again from its checkpoint: the output folder holds the adapter alone."""
    Dataset.from_list(list(path_dataset(16))).to_json(tmp_path / "problems.jsonl")
    root = QUICKSTART.parents[1]
    command = [
        sys.executable, str(root / "recipes" / "selective_grpo.py"), "--model_name_or_path", POLICY, "--expert_model_shares_base",
        "--guided_sampler", "stepwise", "--learning_rate", "3e-2", "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--dataset_name", str(tmp_path / "problems.jsonl"),
        "--reward_funcs", "tests.training.length_reward", "--num_generations", "4", "--num_guided_generations", "2",
        "--per_device_train_batch_size", "8", "--max_completion_length", "26", "--entropy_threshold_init", "1.0", "--max_steps", "2",
        "--save_steps", "1", "--logging_steps", "1", "--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--guidance_steps", "9",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(root)}
    weights = []
    for arguments in ([], ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]):
        result = subprocess.run([*command, *arguments], cwd=root, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        weights.append(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert not list((tmp_path / "out").rglob("model*.safetensors"))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["guidance/expert_drawn"] > 0 for entry in history if "guidance/expert_drawn" in entry] == [
        False,
        True,
    ]
