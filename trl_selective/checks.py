"""What guidance cannot be combined with, beyond single settings (those are checked in `config.py`): models, arguments, generation configs."""

import os
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

# Settings of a generation config that change the law of a token or end a completion, beside those that TRL sets itself, with the values
# at which they do nothing (None always does nothing).
NEUTRAL: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}


def check_arguments(arguments: dict[str, Any], settings: list[str]) -> None:
    """Refuse trainer arguments with which nothing can be guided.

    Args:
        arguments: of the trainer's constructor, by name.
        settings: those that ask for guidance.

    Raises:
        ValueError: if something else than the trainer generates.
    """
    for setting in settings:
        for name in ("tools", "rollout_func", "environment_factory"):
            if arguments.get(name):
                raise ValueError(
                    f"`{name}` cannot be combined with {setting} > 0: guided rollouts and expert completions are single answers, with which "
                    f"the trainer fills a group itself. Drop `{name}` or set {setting}=0."
                )


def check_expert_argument(arguments: dict[str, Any], expert_model: Any, need: str, way_out: str) -> None:
    """Refuse an expert that is missing, no model, or the policy itself.

    Args:
        arguments: of the trainer's constructor, by name.
        expert_model: the expert as given there or in the config.
        need, way_out: the setting that needs an expert, and how to do without, for the message.

    Raises:
        ValueError: if there is no expert, or if it shares parameters with the policy.
    """
    if expert_model is None or expert_model == "":
        raise ValueError(
            f"{need} needs an expert, got none. Pass `expert_model` to the trainer or set `expert_model_name_or_path`, or {way_out}."
        )
    if not isinstance(expert_model, (str, os.PathLike, nn.Module)):
        raise ValueError(
            f"expert_model must be a Hub id, a folder or a model, got {expert_model!r} of type {type(expert_model).__name__}."
        )
    models = [model for model in (expert_model, arguments["model"]) if isinstance(model, nn.Module)]
    if len(models) == 2 and set.intersection(*({id(p) for p in model.parameters()} for model in models)):
        raise ValueError(
            "expert_model shares parameters with the model that is trained, which freezing it would stop. Load it a second time, or pass its "
            "path."
        )


def check_shared_base(arguments: dict[str, Any], expert_model: Any) -> None:
    """Refuse an expert on the policy's base model where the policy has no adapter, or where the expert comes with a base of its own.

    Args:
        arguments: of the trainer's constructor, by name.
        expert_model: the expert as given there or in the config.

    Raises:
        ValueError: saying which.
    """
    if not (arguments.get("peft_config") or isinstance(arguments["model"], PeftModel)):
        raise ValueError(
            "expert_model_shares_base=True needs a policy that trains an adapter, got one whose own weights are trained: its base would not stay "
            "what it is. Pass a `peft_config` (`--use_peft` on the command line), or name an expert and unset expert_model_shares_base."
        )
    if not isinstance(expert_model, (str, os.PathLike, type(None))):
        raise ValueError(
            f"expert_model_shares_base=True takes the folder or Hub id of an adapter, or no expert_model at all for the base itself; got a "
            f"{type(expert_model).__name__}. Unset expert_model_shares_base to use the model that you pass."
        )


def check_columns(dataset: Any, columns: list[str]) -> None:
    """Refuse a dataset that lacks a column of expert completions. One that does not say what it has is left to the first batch.

    Raises:
        ValueError: naming the column.
    """
    there = getattr(dataset, "column_names", None)
    missing = [name for name in columns if name not in there] if there else []
    if missing:
        raise ValueError(
            f"train_dataset has no column {missing[0]!r}, only {there}. Name the column that holds expert completions, their log-probabilities "
            "or sources in expert_completions_column, expert_logprobs_column or expert_sources_column, or set num_injected_completions=0."
        )


def check_generation_config(generation_config: GenerationConfig | None) -> None:
    """Refuse what the policy's own generation config does to on-policy rollouts, since guided ones would not follow it.

    Raises:
        ValueError: naming the settings.
    """
    changed = {name: getattr(generation_config, name, None) for name in NEUTRAL}
    changed = {name: value for name, value in changed.items() if value not in (None, NEUTRAL[name])}
    if changed:
        settings = ", ".join(f"{name}={value}" for name, value in changed.items())
        raise ValueError(
            f"The model's generation_config sets {settings}, which on-policy rollouts would follow and guided ones would not. Set each to "
            "None in `model.generation_config`, or in the generation_config.json beside the weights."
        )
