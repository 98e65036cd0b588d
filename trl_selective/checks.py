"""What guidance cannot be combined with, beyond single settings (those are checked in `config.py`): models, arguments, generation configs."""

import os
from typing import Any

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


def check_arguments(arguments: dict[str, Any], expert_model: Any) -> None:
    """Refuse trainer arguments with which nothing can be guided.

    Args:
        arguments: of the trainer's constructor, by name.
        expert_model: the expert as given there or in the config.

    Raises:
        ValueError: if there is no expert, if it shares parameters with the policy, or if something else than the trainer generates.
    """
    if expert_model is None or expert_model == "":
        raise ValueError(
            "num_guided_generations > 0 needs an expert, got none. Pass `expert_model` to the trainer or set `expert_model_name_or_path`, "
            "or set num_guided_generations=0 for plain GRPO."
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
    for name in ("tools", "rollout_func", "environment_factory"):
        if arguments.get(name):
            raise ValueError(
                f"`{name}` cannot be combined with num_guided_generations > 0: guided rollouts are single completions drawn by the "
                f"trainer itself. Drop `{name}` or set num_guided_generations=0."
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
