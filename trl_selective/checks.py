"""What guidance cannot be combined with, beyond single settings (those are checked in `config.py`): models, arguments, generation configs."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

# Settings of a generation config that change the law of a token or end a completion, beside those that TRL sets itself, with the values
# at which they do nothing (None always does nothing).
NEUTRAL: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
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
    for name in ("tools", "rollout_func", "environment_factory"):
        if settings and arguments.get(name):
            raise ValueError(
                f"`{name}` cannot be combined with {settings[0]} > 0: guided rollouts and expert completions are single answers, with which "
                f"the trainer fills a group itself. Drop `{name}` or set {settings[0]}=0."
            )


def check_expert_argument(arguments: dict[str, Any], expert_model: Any, need: str, way_out: str) -> None:
    """Refuse an expert that is missing, no model, or the policy itself; where a server has it, one that is no name.

    Args:
        arguments: of the trainer's constructor, by name.
        expert_model: the expert as given there or in the config.
        need, way_out: the setting that needs an expert, and how to do without, for the message.

    Raises:
        ValueError: if there is no expert, or if it shares parameters with the policy.
    """
    url = getattr(arguments["args"], "expert_model_server_url", None)
    if url is not None and not (isinstance(expert_model, str) and expert_model):
        raise ValueError(
            f"expert_model_server_url={url!r} needs the name under which the server knows the expert, got {type(expert_model).__name__}. Set "
            "`expert_model_name_or_path` to it, or unset the url to guide with a model in this process."
        )
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


def check_prompts(dataset: Any, tokenizer: PreTrainedTokenizerBase, has_chat_template: bool) -> None:
    """Look at all prompts before training starts: the last row comes up days later. A stream is left to its batches.

    Raises:
        ValueError: naming the row and what is wrong with it.
    """
    if not isinstance(dataset, Dataset) or known_columns(dataset) is None:
        return
    if not len(dataset) or "prompt" not in dataset.column_names:
        raise ValueError(
            f"train_dataset must have rows, and a column 'prompt', got {len(dataset)} rows with the columns {dataset.column_names}. Rename the "
            "column with the problems: `dataset.rename_column(..., 'prompt')`."
        )
    for row, prompt in enumerate(dataset["prompt"]):
        if problem := _prompt_problem(prompt, tokenizer, has_chat_template):
            raise ValueError(f"Row {row} of train_dataset has the prompt {repr(prompt)[:60]}, {problem}")


def _prompt_problem(prompt: Any, tokenizer: PreTrainedTokenizerBase, has_chat_template: bool) -> str | None:
    if isinstance(prompt, str):
        is_empty = not prompt.strip() and not tokenizer(prompt)["input_ids"]
        return "which has no token: nothing could follow it. Leave the row out." if is_empty else None
    if (
        not isinstance(prompt, Sequence)
        or not prompt
        or not all(isinstance(m, Mapping) and m.get("role") for m in prompt)
    ):
        return "expected a text, or a conversation such as [{'role': 'user', 'content': 'What is 2 + 2?'}]. Correct it, or leave the row out."
    if not has_chat_template:
        return "a conversation, but the tokenizer has no chat template. Pass one that has (tokenizer_name_or_path on the command line), or give texts."
    return None


def known_columns(dataset: Any) -> list | None:
    """The columns of a dataset; None where only its rows know, those of a stream or of a transform (`with_transform`)."""
    is_made_on_demand = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return None if is_made_on_demand else getattr(dataset, "column_names", None)


def check_columns(dataset: Any, columns: list[str]) -> None:
    """Refuse a dataset that lacks a column of expert completions. One that does not say what it has is left to the first batch.

    Raises:
        ValueError: naming the column.
    """
    there = known_columns(dataset)
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


def refuse_update(is_finite: Tensor, prompts: list[str]) -> None:
    """Stop before an update that would turn every parameter into NaN. All processes call this together, those without such a row too.

    Args:
        is_finite: (rows,) of a micro-batch, False where the policy gives a token no finite log-probability or entropy.
        prompts: of these rows.

    Raises:
        ValueError: naming the rows.
    """
    rows = (~is_finite).nonzero().flatten().tolist()
    names = ", ".join(f"row {row} (prompt {prompts[row][-60:]!r})" for row in rows) or "rows of another process"
    raise ValueError(
        f"The policy gives tokens of this micro-batch no finite log-probability or entropy: {names}. Nothing was updated. Look for NaN or inf in "
        "its weights, a learning rate that is too high, float16 overflow (use bfloat16), or tokens that it forbids (logit -inf), which an "
        "expert must not use and of which an entropy threshold cannot be measured (guidance_weighting='constant' needs none)."
    )


def check_scored(logps: Sequence[Tensor], prompts: Sequence[Any]) -> None:
    """Refuse expert completions to which the expert model itself gives no finite log-probability: no ratio can be taken to it.

    Raises:
        ValueError: naming the prompt and the token.
    """
    for values, prompt in zip(logps, prompts, strict=True):
        if len(invalid := (~values.isfinite()).nonzero().flatten()):
            position = int(invalid[0])
            raise ValueError(
                f"The expert gives token {position} of a completion for the prompt {prompt!r} the log-probability {values[position].item()}, "
                "expected a finite number: injection_correction divides by its probability. Look for NaN or inf in the expert's weights, leave "
                "the completion out, or use injection_correction='policy_shaping'."
            )


def late_start_problem(args: Any, max_steps: int) -> str | None:
    """What keeps all rollouts from being guided, if anything does: guidance is over before the first batch that could be, the second one.

    Args:
        args: a `SelectiveGuidanceGRPOConfig` with which the first batch measures the entropy threshold.
        max_steps: of the run.
    """
    second = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    if second < max_steps and args.guidance_coef_schedule(max_steps)(second) > 0:
        return None
    over = f"training ends at step {max_steps}" if second >= max_steps else f"alpha is 0 by step {second}"
    return (
        f"No rollout will be guided: the entropy threshold is measured on the first batch, which lasts until step {second}, and {over}. Set "
        "entropy_threshold_init, raise guidance_steps, or train for longer."
    )


def check_model_rewards(rewards: Tensor, name: str) -> None:
    """Refuse what a reward model gives if it is no number. (Functions are watched as they are called, and may give None.)

    Args:
        rewards: (rows of all processes,), so that all of them stop together.
        name: of the model.

    Raises:
        ValueError: naming model and row.
    """
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(
            f"The reward model {name!r} gives row {row} of the batch the reward {rewards[row].item()}, expected a finite number. Look for NaN or "
            "inf in its weights, or float16 overflow (load it in bfloat16 or float32)."
        )
