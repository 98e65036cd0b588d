"""Policies, experts and tokenizers with which nothing can be guided, and weights that are no numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from tests.bad_input.case import Case, Error, Warned
from tests.training import EXPERT, INJECTED, PLAIN, POLICY, expert_dataset, make_trainer
from trl_selective.selection import First, GroupFailed

NOWHERE = "Training has stopped at step 0. Once this is mended, start it again: it has no checkpoint."
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
Changes = Callable[[Path], dict[str, Any]]


def refused(given: str, changes: dict[str, Any] | Changes, says: str, kind: type[Case] = Error, **more) -> Case:
    """When the trainer is made, with these changes to a guided run."""

    def cause(folder: Path) -> None:
        make_trainer(folder / "out", **(changes(folder) if callable(changes) else changes))

    return kind(given, cause, says, **more)


def stopped(given: str, changes: Changes, says: str) -> Case:
    """In the first step."""
    return Error(given, lambda folder: make_trainer(folder, **changes(folder)).train(), f"{says}\n{NOWHERE}")


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name)


def saved(
    folder: Path, model: PreTrainedModel | PeftModel | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> str:
    """A folder with these."""
    for part in (model, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    return str(folder)


def adapter(folder: Path, base: str = POLICY, **lora) -> str:
    return saved(folder, get_peft_model(load(base), LoraConfig(**{**LORA, **lora})))


# ---- Policies -------------------------------------------------------------------------------------------------------------------------------


def bent(**settings) -> Changes:
    """A policy whose generation config has these."""

    def changes(folder: Path) -> dict[str, Any]:
        model = load(POLICY)
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        return {"model": model}

    return changes


def itself(folder: Path) -> dict[str, Any]:
    model = load(POLICY)
    return {"model": model, "expert_model": model}


def its_base(folder: Path) -> dict[str, Any]:
    model = load(POLICY)
    return {"model": get_peft_model(model, LoraConfig(**LORA)), "expert_model": model}


def without_numbers(of_policy: bool) -> Changes:
    """A model whose head is NaN."""

    def changes(folder: Path) -> dict[str, Any]:
        model = load(POLICY if of_policy else EXPERT)
        torch.nn.init.constant_(model.lm_head.weight, torch.nan)
        return {"model" if of_policy else "expert_model": model}

    return changes


# ---- Experts --------------------------------------------------------------------------------------------------------------------------------


def with_other_ids(folder: Path) -> dict[str, Any]:
    """A tokenizer with two ids swapped."""
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["U"], words["D"] = words["D"], words["U"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return {"init": {"expert_processing_class": AutoTokenizer.from_pretrained(folder)}}


def with_another_end(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(EXPERT)
    tokenizer.eos_token = "~"
    return {"expert_model": saved(folder / "expert", load(EXPERT), tokenizer)}


def without_tokenizer(folder: Path) -> dict[str, Any]:
    return {"expert_model": saved(folder / "expert", load(EXPERT))}


def with_sliding_windows(folder: Path) -> dict[str, Any]:
    config = Qwen2Config(
        vocab_size=45, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        use_sliding_window=True, sliding_window=8, max_window_layers=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    init = {"expert_processing_class": AutoTokenizer.from_pretrained(EXPERT)}
    return {"expert_model": AutoModelForCausalLM.from_config(config), "guided_sampler": "speculative", "init": init}


def built_in_memory(folder: Path) -> dict[str, Any]:
    expert = load(EXPERT)
    expert.config.name_or_path = ""
    return {"expert_model": expert}


def as_a_pickle(folder: Path) -> dict[str, Any]:
    expert, path = load(EXPERT), folder / "expert"
    saved(path, expert, AutoTokenizer.from_pretrained(EXPERT))
    (path / "model.safetensors").unlink()
    torch.save(expert.state_dict(), path / "pytorch_model.bin")
    return {"expert_model": str(path)}


def cut_off(folder: Path) -> dict[str, Any]:
    path = Path(saved(folder / "expert", load(EXPERT), AutoTokenizer.from_pretrained(EXPERT))) / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {"expert_model": str(path.parent)}


def with_code_of_its_own(folder: Path) -> dict[str, Any]:
    path = folder / "expert"
    saved(path, load(EXPERT), AutoTokenizer.from_pretrained(EXPERT))
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text("raise SystemExit('code of a stranger has run')\n")
    return {"expert_model": str(path)}


def loaded(folder: Path) -> dict[str, Any]:
    return {"expert_model": load(EXPERT), "expert_model_init_kwargs": {"dtype": "float32"}}


def loaded_and_placed(folder: Path) -> dict[str, Any]:
    expert = load(EXPERT)
    expert.hf_device_map = {"": "cpu"}
    return {"expert_model": expert, "expert_model_offload": True}


# ---- Experts on the policy's base ------------------------------------------------------------------------------------------------------------


def on_the_base(**changes) -> dict[str, Any]:
    """A policy with an adapter, and its own base as the expert."""
    lora = LoraConfig(**{**LORA, **changes.pop("lora", {})})
    return {"expert_model": None, "expert_model_shares_base": True, "init": {"peft_config": lora}, **changes}


def prompt_tuning(folder: Path) -> dict[str, Any]:
    return on_the_base(init={"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)})


def of_another_shape(folder: Path) -> dict[str, Any]:
    path = Path(adapter(folder / "adapter")) / "adapter_model.safetensors"
    save_file({name: value[:1].contiguous() for name, value in load_file(path).items()}, path)
    return on_the_base(expert_model=str(path.parent))


def with_another_end_beside_it(folder: Path) -> dict[str, Any]:
    path = adapter(folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    tokenizer.eos_token = "~"
    return on_the_base(expert_model=saved(Path(path), None, tokenizer))


TRUNCATED = {"settings": INJECTED, "train_dataset": expert_dataset(2), "injection_correction": "truncated"}
NOT_NEEDED = {"settings": PLAIN, "init": {"expert_model": EXPERT}}
NO_INJECTION = {"settings": PLAIN, "init": {"injection_trigger": GroupFailed(), "injection_selector": First()}}

SECTIONS = {
    "Policies and trainer arguments": (
        "Beside `num_guided_generations=2`, if nothing else is said.",
        [
            refused("a generation config with `suppress_tokens`", bent(suppress_tokens=[3]), "The model's generation_config sets suppress_tokens=[3], which on-policy rollouts would follow and guided ones would not. Set each to None in `model.generation_config`, or in the generation_config.json beside the weights."),
            refused("a generation config with `min_p`", bent(min_p=0.1), "The model's generation_config sets min_p=0.1, which on-policy rollouts would follow and guided ones would not. Set each to None in `model.generation_config`, or in the generation_config.json beside the weights."),
            refused("a generation config with `typical_p`", bent(typical_p=0.5), "The model's generation_config sets typical_p=0.5, which on-policy rollouts would follow and guided ones would not. Set each to None in `model.generation_config`, or in the generation_config.json beside the weights."),
            refused("a generation config with `max_time`", bent(max_time=9.0), "The model's generation_config sets max_time=9.0, which on-policy rollouts would follow and guided ones would not. Set each to None in `model.generation_config`, or in the generation_config.json beside the weights."),
            refused("a generation config with `encoder_no_repeat_ngram_size`", bent(encoder_no_repeat_ngram_size=2), "The model's generation_config sets encoder_no_repeat_ngram_size=2, which on-policy rollouts would follow and guided ones would not. Set each to None in `model.generation_config`, or in the generation_config.json beside the weights."),
            refused("`tools`", {"init": {"tools": [print]}}, "`tools` cannot be combined with num_guided_generations > 0: guided rollouts and expert completions are single answers, with which the trainer fills a group itself. Drop `tools` or set num_guided_generations=0."),
            refused("`rollout_func`", {"init": {"rollout_func": print}}, "`rollout_func` cannot be combined with num_guided_generations > 0: guided rollouts and expert completions are single answers, with which the trainer fills a group itself. Drop `rollout_func` or set num_guided_generations=0."),
            refused("`environment_factory`", {"init": {"environment_factory": print}}, "`environment_factory` cannot be combined with num_guided_generations > 0: guided rollouts and expert completions are single answers, with which the trainer fills a group itself. Drop `environment_factory` or set num_guided_generations=0."),
            refused("`tools`, with `num_injected_completions=1`", {**TRUNCATED, "init": {"tools": [print]}}, "`tools` cannot be combined with num_injected_completions > 0: guided rollouts and expert completions are single answers, with which the trainer fills a group itself. Drop `tools` or set num_injected_completions=0."),
            refused("`injection_trigger` and `injection_selector`, without injection", NO_INJECTION, "injection_trigger or injection_selector is given, but without effect: num_injected_completions is 0. Set it in a SelectiveGuidanceGRPOConfig.", Warned),
            stopped("a policy whose weights are NaN", without_numbers(of_policy=True), "Row …, token … has log pi_mix = nan and guidance weight w = …, expected a finite log-probability and a weight in [0, 1]: the policy or the expert returned a distribution that is not finite. Look for NaN or inf in their weights, a learning rate that is too high, or float16 overflow (use bfloat16)."),
        ],
    ),
    "Experts and tokenizers": (
        "Of `num_guided_generations=2`, if nothing else is said.",
        [
            refused("no expert", {"expert_model": None}, "num_guided_generations > 0 needs an expert, got none. Pass `expert_model` to the trainer or set `expert_model_name_or_path`, or set num_guided_generations=0 for plain GRPO."),
            refused("an empty name", {"expert_model": ""}, "num_guided_generations > 0 needs an expert, got none. Pass `expert_model` to the trainer or set `expert_model_name_or_path`, or set num_guided_generations=0 for plain GRPO."),
            refused("a number", {"expert_model": 3}, "expert_model must be a Hub id, a folder or a model, got 3 of type int."),
            refused("`injection_correction='truncated'`, without log-probabilities and expert", TRUNCATED, "injection_correction='truncated' without an expert_logprobs_column needs an expert, got none. Pass `expert_model` to the trainer or set `expert_model_name_or_path`, or set expert_logprobs_column, or use 'policy_shaping'."),
            refused("the policy itself", itself, "expert_model shares parameters with the model that is trained, which freezing it would stop. Load it a second time, or pass its path."),
            refused("the base of the policy's adapter, as the same object", its_base, "expert_model shares parameters with the model that is trained, which freezing it would stop. Load it a second time, or pass its path."),
            refused("a name that nobody knows", {"expert_model": "some/expert"}, "The expert 'some/expert' could not be loaded. Expected a Hub id, a folder with a model, or a model; its weights in safetensors, into which `save_pretrained` puts older ones (or set use_safetensors to False in expert_model_init_kwargs, if you trust them). …"),
            refused("weights as a pickle", as_a_pickle, "The expert '…/expert' could not be loaded. Expected a Hub id, a folder with a model, or a model; its weights in safetensors, into which `save_pretrained` puts older ones (or set use_safetensors to False in expert_model_init_kwargs, if you trust them). …"),
            refused("weights that are cut off", cut_off, "The expert '…/expert' could not be loaded. Expected a Hub id, a folder with a model, or a model; its weights in safetensors, into which `save_pretrained` puts older ones (or set use_safetensors to False in expert_model_init_kwargs, if you trust them). …"),
            refused("a model with code of its own", with_code_of_its_own, "…custom code…trust_remote_code=True…"),
            refused("no tokenizer beside the weights", without_tokenizer, "No tokenizer could be loaded beside the expert '…/expert', to compare its vocabulary with the policy's. Save it there, or pass `expert_processing_class` to the trainer."),
            refused("a model that was built in memory, without `expert_processing_class`", built_in_memory, "The expert was built in memory, so its tokenizer is unknown and its vocabulary is taken to be the policy's. Pass `expert_processing_class` to have it checked.", Warned),
            refused("a tokenizer with other ids", with_other_ids, "The expert's tokenizer maps 'U' to 39 but the policy's maps it to 38. Token-level guidance needs one vocabulary: choose an expert of the policy's model family."),
            refused("a tokenizer with another end token", with_another_end, "The expert ends its answers with ['~'] (ids [44]), but the policy ends with ids [1] only, so that rollouts would run on behind the expert's end. Give the policy a tokenizer whose `eos_token` is '~', add the ids to its `generation_config.eos_token_id`, or correct the expert's."),
            refused("sliding windows, with `guided_sampler='speculative'`", with_sliding_windows, "The expert (Qwen2ForCausalLM) has sliding-window or recurrent layers, or counts distances in columns of its cache, which cannot take rejected tokens back. Use guided_sampler='coin', which never takes any back."),
            refused("a loaded model, with `expert_model_init_kwargs`", loaded, "expert_model is a LlamaForCausalLM, but expert_model_revision=None and expert_model_init_kwargs={'dtype': 'float32'} say how to load one. Pass the expert as a name or path, or leave both unset."),
            refused("a model with a device map, with `expert_model_offload=True`", loaded_and_placed, "expert_model_offload=True needs an expert that can be moved, got one with a device map or quantised weights, which stays where it was loaded. Set expert_model_offload=False, or load the expert without either."),
            refused("an expert, with `num_guided_generations=0`", NOT_NEEDED, "An expert is given, but without effect: num_guided_generations is 0. Set it in a SelectiveGuidanceGRPOConfig.", Warned),
            stopped("an expert whose weights are NaN", without_numbers(of_policy=False), "Row …, token … has log pi_mix = nan and guidance weight w = …, expected a finite log-probability and a weight in [0, 1]: the policy or the expert returned a distribution that is not finite. Look for NaN or inf in their weights, a learning rate that is too high, or float16 overflow (use bfloat16)."),
        ],
    ),
    "Experts on the policy's base": (
        "With `expert_model_shares_base=True` and a `peft_config`.",
        [
            refused("no `peft_config`", on_the_base(init={}), "expert_model_shares_base=True needs a policy that trains an adapter, got one whose own weights are trained: its base would not stay what it is. Pass a `peft_config` (`--use_peft` on the command line), or name an expert and unset expert_model_shares_base."),
            refused("a loaded model", lambda folder: {**on_the_base(), "expert_model": load(EXPERT)}, "expert_model_shares_base=True takes the folder or Hub id of an adapter, or no expert_model at all for the base itself; got a LlamaForCausalLM. Unset expert_model_shares_base to use the model that you pass."),
            refused("a whole model in place of an adapter", on_the_base(expert_model=EXPERT), "expert_model_shares_base=True takes an adapter of the policy's base model, got '…/expert', where none was found. Name a folder or Hub id with an adapter_config.json, leave it unset for the base itself, or set expert_model_shares_base=False. …"),
            refused("a policy's adapter with `bias='all'`", on_the_base(lora={"bias": "all"}), "The policy's adapter has bias='all', which changes the base model that policy and expert would share. Use an adapter that leaves the base alone, or load the expert as a model of its own: expert_model_shares_base=False."),
            refused("a policy's adapter that starts as PiSSA", on_the_base(lora={"init_lora_weights": "pissa"}), "The policy's adapter has init_lora_weights='pissa', which changes the base model that policy and expert would share. Use an adapter that leaves the base alone, or load the expert as a model of its own: expert_model_shares_base=False."),
            refused("a policy's adapter with `layer_replication`", on_the_base(lora={"layer_replication": [[0, 2], [1, 2]]}), "The policy's adapter has layer_replication=[[0, 2], [1, 2]], which changes the base model that policy and expert would share. Use an adapter that leaves the base alone, or load the expert as a model of its own: expert_model_shares_base=False."),
            refused("a policy's adapter with `modules_to_save`", on_the_base(lora={"modules_to_save": ["embed_tokens"]}), "The policy's adapter trains whole modules (model.embed_tokens.weight), so that the base model is not what it was. Use an adapter without modules_to_save, or load the expert as a model of its own: expert_model_shares_base=False."),
            refused("a prompt-tuning adapter", prompt_tuning, "The policy has a PromptTuningConfig adapter, which cannot be taken off its base. Use an adapter that changes weights, such as LoRA, or load the expert as a model of its own: expert_model_shares_base=False."),
            refused("an expert's adapter with `bias='lora_only'`", lambda folder: on_the_base(expert_model=adapter(folder / "adapter", bias="lora_only")), "The expert's adapter has bias='lora_only', which changes the base model that policy and expert would share. Use an adapter that leaves the base alone, or load the expert as a model of its own: expert_model_shares_base=False."),
            refused("an expert's adapter of another shape", of_another_shape, "The expert '…/adapter' does not fit on the policy's base model. Choose an adapter of that base, or set expert_model_shares_base=False to load it with a base of its own. …"),
            refused("an expert's adapter of another base", lambda folder: on_the_base(expert_model=adapter(folder / "adapter", EXPERT)), "The expert '…/adapter' was made for '…/expert', and guides from the base '…/recipes/quickstart/policy': an adapter is an expert on its own base only.", Warned),
            refused("another end token beside an expert's adapter", with_another_end_beside_it, "The expert ends its answers with ['~'] (ids [44]), but the policy ends with ids [1] only, so that rollouts would run on behind the expert's end. Give the policy a tokenizer whose `eos_token` is '~', add the ids to its `generation_config.eos_token_id`, or correct the expert's."),
        ],
    ),
}  # fmt: skip
