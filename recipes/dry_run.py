"""What would a recipe do, and does it fit? `selective_grpo.py --dry_run`: checks that need no weights, and an estimate of memory.

The settings have been checked by then, as every start checks them. Models are described by the config in a local folder or in the Hub's cache;
for those of the recipes by `architectures.yaml`; else by the Hub. Data is looked at where it is on this machine.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from loading import RecipeArguments, choose_split, load_rewards, load_splits
from transformers import AutoConfig, PreTrainedConfig
from trl import ModelConfig, get_peft_config

from trl_selective import SelectiveGuidanceGRPOConfig
from trl_selective.checks import check_columns
from trl_selective.grading import OWN_COLUMNS
from trl_selective.memory import (
    GIB,
    Estimate,
    ModelSize,
    Run,
    estimate_memory,
    model_size,
    num_adapter_parameters,
    rollout_bytes_per_token,
)
from trl_selective.reward_calls import GIVEN
from trl_selective.reward_scale import check_correctness_reward

ARCHITECTURES = Path(__file__).with_name("architectures.yaml")
PROMPT_TOKENS = 1024  # the paper's limit of prompts
DEVICE_GIB = 80  # where there is no accelerator to ask
DTYPE_BYTES = {"float32": 4, "auto": 2, "bfloat16": 2, "float16": 2}
OPTIMIZER_VALUES = {
    "adamw": 2,
    "adafactor": 0,
    "sgd": 0,
    "lion": 1,
}  # numbers kept for each parameter, by how the name starts
GIVEN_TO_REWARDS = {"prompts", "completions", "completion_ids", *GIVEN}


def dry_run(arguments: RecipeArguments, args: SelectiveGuidanceGRPOConfig, model: ModelConfig) -> str:
    """The report.

    Raises:
        ValueError: for what would fail later.
    """
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: give the Hub id or the folder of the policy.")
    rewards = load_rewards(arguments, args)
    check_rewards(arguments, args, rewards)
    is_elsewhere = arguments.dataset_name is not None and not Path(arguments.dataset_name).exists()
    found = f"{arguments.dataset_name} is not on this machine" if is_elsewhere else data(arguments, args, rewards)
    num_processes = arguments.num_processes or 1
    parts = [
        "Dry run: nothing is loaded or written.",
        f"settings: {settings(args)}",
        f"batches: {batches(args, num_processes)}",
        f"alpha: {alpha(args)}",
        f"rewards: {', '.join(arguments.reward_funcs)}, weights {args.reward_weights or 'all 1'}",
        f"data: {found}",
        *memory(args, model, num_processes, arguments.memory_gib or device_gib()),
        *([f"The data was not checked: {found}."] if is_elsewhere else []),
    ]
    return "\n".join(parts)


# ---- Settings --------------------------------------------------------------------------------------------------------------------------


def check_rewards(arguments: RecipeArguments, args: SelectiveGuidanceGRPOConfig, rewards: list[Callable]) -> None:
    names, weights = arguments.reward_funcs or [], args.reward_weights
    if not names:
        raise ValueError("reward_funcs is not set: name at least one reward function.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"reward_weights has {len(weights)} entries, expected one for each of the reward_funcs {names}."
        )
    if args.correctness_reward is not None:
        check_correctness_reward(args.correctness_reward, [reward.__name__ for reward in rewards])


def settings(args: SelectiveGuidanceGRPOConfig) -> str:
    """The guidance settings that are in effect, as they came out of preset and defaults."""
    if args.preset is not None:
        return args.preset_in_words()
    return ", ".join(f"{name}={value!r}" for name, value in args.in_effect().items())


def batches(args: SelectiveGuidanceGRPOConfig, num_processes: int) -> str:
    """The arithmetic of a rollout batch.

    Raises:
        ValueError: if it does not come out even.
    """
    local = args.per_device_train_batch_size * args.steps_per_generation
    if num_processes * local % args.num_generations:
        raise ValueError(
            f"num_processes * per_device_train_batch_size * steps_per_generation = {num_processes} * {args.per_device_train_batch_size} * "
            f"{args.steps_per_generation} is no multiple of num_generations={args.num_generations}: change one of them."
        )
    if args.steps_per_generation * args.num_iterations % args.gradient_accumulation_steps:
        raise ValueError(
            f"steps_per_generation={args.steps_per_generation} is no multiple of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: an update would mix two rollout batches. Change one of them."
        )
    updates = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    kinds = {"guided": args.num_guided_generations, "expert completions at most": args.num_injected_completions}
    of_which = "".join(f", {number} {kind}" for kind, number in kinds.items() if number)
    return (
        f"{num_processes * local // args.num_generations} prompts x {args.num_generations} rollouts{of_which}; {updates} updates per batch; "
        f"{num_processes} processes with {local} rollouts each, {args.per_device_train_batch_size} per forward and backward pass"
    )


def alpha(args: SelectiveGuidanceGRPOConfig) -> str:
    if not (args.num_guided_generations or args.num_injected_completions):
        return "no guidance, plain GRPO"
    if args.max_steps <= 0:
        return "depends on the number of steps, which follows from the data; set max_steps to see it"
    coefs = map(args.guidance_coef_schedule(args.max_steps), range(args.max_steps))
    end = next((step for step, coef in enumerate(coefs) if coef == 0), None)
    if end is None:
        return f"{args.guidance_coef:g}, above 0 in all {args.max_steps} steps"
    return f"from {args.guidance_coef:g} to 0 at step {end} of {args.max_steps}, then plain GRPO"


# ---- Data ------------------------------------------------------------------------------------------------------------------------------


def data(arguments: RecipeArguments, args: SelectiveGuidanceGRPOConfig, rewards: list[Callable]) -> str:
    """What the data is, once it was found to have what the run reads.

    Raises:
        ValueError: naming what it lacks.
    """
    rows = choose_split(load_splits(arguments), arguments.dataset_train_split, "dataset_train_split")
    passed_on = [name for name in rows.column_names if name not in OWN_COLUMNS]
    for name, reward in zip(arguments.reward_funcs, rewards, strict=True):
        if missing := [column for column in columns_of(reward) if column not in passed_on]:
            raise ValueError(
                f"reward_funcs: {name} reads the column {missing[0]!r}, but of the data TRL passes on only {passed_on}."
            )
    found = f"{arguments.dataset_name}, {len(rows)} rows with the columns {rows.column_names}"
    return found + (f"; {completions(rows, args)}" if args.num_injected_completions else "")


def columns_of(reward: Callable) -> list[str]:
    """The columns that a reward function cannot do without."""
    parameters = inspect.signature(reward).parameters.values()
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return [name for name in needed if name not in GIVEN_TO_REWARDS]


def completions(rows: Dataset, args: SelectiveGuidanceGRPOConfig) -> str:
    columns = [args.expert_completions_column, args.expert_logprobs_column, args.expert_sources_column]
    check_columns(rows, [column for column in columns if column])
    with_any = sum(bool(row) for row in rows[args.expert_completions_column])
    if not with_any:
        raise ValueError(
            f"No row has a completion in the expert_completions_column {args.expert_completions_column!r}."
        )
    return f"{with_any} rows have expert completions"


# ---- Memory ----------------------------------------------------------------------------------------------------------------------------


@cache
def find_config(name: str) -> tuple[PreTrainedConfig, str]:
    """The config of a model, and where it is from.

    Raises:
        ValueError: if there is none.
    """
    try:
        return AutoConfig.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        ), "its config on this machine"
    except (OSError, ValueError):
        facts = dict(yaml.safe_load(ARCHITECTURES.read_text(encoding="utf-8"))).get(name)
    if facts is not None:
        return AutoConfig.for_model(**facts), ARCHITECTURES.name
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False), "the Hub"
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The config of {name!r} is neither on this machine nor in {ARCHITECTURES.name} nor on a Hub that can be reached: memory cannot be "
            "estimated. Name a folder with its config.json, or add it to that file."
        ) from error


def plan(args: SelectiveGuidanceGRPOConfig, model: ModelConfig, gib: float) -> Run:
    """One process of the run, for the estimate, on a device with this much memory."""
    config, _ = find_config(model.model_name_or_path)
    policy, adapter = model_size(config), get_peft_config(model)
    weight_bytes = DTYPE_BYTES[model.dtype or "float32"]
    engine = args.vllm_gpu_memory_utilization * gib * GIB if args.vllm_mode == "colocate" else 0
    needs_expert = args.num_guided_generations or args.injection_needs_expert_logps
    is_here = needs_expert and args.expert_model_server_url is None
    expert: ModelSize | None = None
    if is_here and args.expert_model_shares_base:
        expert = policy  # an adapter on it takes next to nothing
    elif is_here and args.expert_model_name_or_path is not None:
        expert = model_size(find_config(args.expert_model_name_or_path)[0])
    expert_dtype = str((args.expert_model_init_kwargs or {}).get("dtype", "bfloat16")).removeprefix("torch.")
    rows = args.per_device_train_batch_size * args.steps_per_generation
    is_drafting = args.guided_sampler in ("auto", "speculative") and not (
        args.use_vllm or args.expert_model_server_url
    )
    return Run(
        policy=policy,
        weight_bytes=weight_bytes,
        num_trainable=num_adapter_parameters(config, adapter) if adapter else policy.num_parameters,
        trainable_bytes=4 if adapter else weight_bytes,  # PEFT keeps adapters in float32
        optimizer_values=next((n for name, n in OPTIMIZER_VALUES.items() if str(args.optim).startswith(name)), 2),
        expert=expert,
        expert_bytes=weight_bytes if args.expert_model_shares_base else DTYPE_BYTES.get(expert_dtype, 2),
        shares_base=args.expert_model_shares_base,
        is_expert_offloaded=args.expert_model_offload,
        frozen_copies=(args.beta != 0 and not adapter) + (args.mixture_policy == "initial"),
        rows=rows,
        guided_rows=rows // args.num_generations * args.num_guided_generations,
        row_tokens=PROMPT_TOKENS + args.max_completion_length,
        draft_tokens=(args.draft_length or args.max_draft_length) + 1 if is_drafting else 1,
        micro_rows=args.per_device_train_batch_size,
        is_checkpointed=args.gradient_checkpointing,
        engine_bytes=int(engine) if args.use_vllm else None,
    )


def device_gib() -> float:
    """Memory of the accelerator here, or of an A100 or H100."""
    return torch.cuda.mem_get_info()[1] / GIB if torch.cuda.is_available() else DEVICE_GIB


def memory(args: SelectiveGuidanceGRPOConfig, model: ModelConfig, num_processes: int, gib: float) -> list[str]:
    """The estimate as lines of a table, without sharding and with it."""
    run = plan(args, model, gib)
    runs = {"no sharding": run}
    if num_processes > 1:
        runs[f"ZeRO-2 x {num_processes}"] = replace(run, num_shards=num_processes)
        runs[f"ZeRO-3 x {num_processes}"] = replace(run, num_shards=num_processes, is_policy_sharded=True)
    estimates = [estimate_memory(each) for each in runs.values()]
    return [
        *(f"{role}: {who}" for role, who in roles(args, model, run).items()),
        f"memory per device in GiB, if all rollouts have {run.row_tokens} tokens (prompts of {PROMPT_TOKENS}):",
        _line("", runs),
        *(_line(name, amounts) for name, amounts in table(estimates)),
        *(fit(each, name, gib) for name, each in runs.items()),
        "Not counted: the CUDA context, fragmentation, communication buffers, CUDA graphs (some GiB), quantisation. FSDP2 needs what ZeRO-3 needs.",
    ]


def roles(args: SelectiveGuidanceGRPOConfig, model: ModelConfig, run: Run) -> dict[str, str]:
    found = {"policy": described(model.model_name_or_path, run.policy)}
    if run.shares_base and run.expert:
        found["expert"] = "on the policy's base model, with a cache of its own"
    elif run.expert:
        found["expert"] = described(args.expert_model_name_or_path, run.expert)
    elif args.expert_model_server_url is not None:
        found["expert"] = f"{args.expert_model_name_or_path}, behind a server"
    return found


def described(name: str, size: ModelSize) -> str:
    _, source = find_config(name)
    return f"{name}, {size.num_parameters / 1e9:.2f}e9 parameters (from {source})"


def table(estimates: list[Estimate]) -> list[tuple[str, list[str]]]:
    """Rows of the table: what is held all the time, then each phase with its peak."""
    rows: list[tuple[str, list[int]]] = []
    for phase in ("always", "rollouts", "update"):
        parts: list[dict[str, Any]] = [getattr(estimate, phase) for estimate in estimates]
        names = dict.fromkeys(name for part in parts for name in part)
        rows += [(f"{phase}: {name}", [part.get(name, 0) for part in parts]) for name in names]
    rows += [
        ("peak of rollouts", [e.rollout_peak for e in estimates]),
        ("peak of an update", [e.update_peak for e in estimates]),
    ]
    return [(name, [f"{size / GIB:.1f}" for size in sizes]) for name, sizes in rows]


def fit(run: Run, name: str, gib: float) -> str:
    """How long rollouts may get on one device."""
    room = gib * GIB - estimate_memory(replace(run, row_tokens=0)).rollout_peak
    update = estimate_memory(run).update_peak / GIB
    if update > gib or room < 0:
        return f"{name}: does not fit into {gib:.0f} GiB."
    if not (per_token := rollout_bytes_per_token(run)):
        return f"{name}: fits into {gib:.0f} GiB."
    tokens = int(room // per_token)
    until = "at full length"
    if tokens < run.row_tokens:
        until = f"while the rows still being written have up to {tokens} tokens"
        if run.guided_rows and run.engine_bytes is None:
            until += ", then half of them wait"
    return f"{name}: fits into {gib:.0f} GiB {until} ({1000 * per_token / GIB:.1f} GiB per 1000 tokens of all {run.rows} rows)."


def _line(name: str, cells: Any) -> str:
    return f"  {name:42}" + "".join(f"{cell:>16}" for cell in cells)
