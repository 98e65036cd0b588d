"""The problems of `evaluate.py`: benchmarks by name, and datasets of one's own, as prompts with their solutions."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from command_line import setting
from datasets import Dataset
from loading import ScriptArguments, as_conversation, choose_split, load_reward, load_splits, read_splits

from trl_selective.evaluation import BENCHMARKS, SamplingProtocol, as_problem
from trl_selective.evaluation.benchmarks import MATH
from trl_selective.rewards import boxed_accuracy_reward


@dataclass
class ProblemArguments:
    benchmarks: list[str] = setting(f"Any of {', '.join(BENCHMARKS)}.", [])
    dataset_name: str | None = setting("A dataset beside them: Hub id, .json/.jsonl/.parquet/.csv file, or folder.")
    dataset_config: str | None = setting("Configuration of a dataset on the Hub.")
    dataset_split: str = setting("Split of the dataset.", "test")
    prompt_column: str = setting("Its column with the problem: a text or a conversation.", "prompt")
    answer_column: str = setting("Its column with the answer, which becomes `solution`.", "solution")
    reward_func: str | None = setting(
        "What grades its answers: `package.module.function`, also of files here, or a name that selective_grpo.py knows; default: "
        "boxed_accuracy. trl_selective.rewards.boxed_choice_reward is for letters."
    )
    max_problems: int | None = setting("Evaluate only the first ones of each.")
    instruction: str | None = setting(
        "End of each prompt; default: the benchmark's, but none for a dataset, nor for mathematics with a system_prompt; '' for none."
    )
    system_prompt: str | None = setting("Turns text prompts into conversations that start with this system message.")
    apply_chat_template: bool | None = setting("Turn text prompts into conversations also without a system prompt.")


@dataclass
class SamplingArguments:
    num_samples: int | None = setting("Completions of each problem.")
    temperature: float | None = setting("0 takes the most likely token.")
    top_p: float | None = setting("Of nucleus sampling, in (0, 1]; default: 1.")
    max_completion_length: int | None = setting("Tokens at which a completion is cut off; default: 8192.")
    seed: int = setting("Of all that is drawn.", 0)
    ks: list[int] | None = setting("The k of pass@k, at most num_samples; default: 1, 2, 4, ... up to it.")


@dataclass(frozen=True)
class Task:
    """What is evaluated under one name."""

    name: str
    dataset: str
    config: str | None
    split: str
    problems: Dataset
    reward_func: Callable
    protocol: SamplingProtocol


def load_tasks(arguments: ProblemArguments, sampling: SamplingArguments) -> list[Task]:
    unknown = [name for name in arguments.benchmarks if name not in BENCHMARKS]
    if unknown or not (arguments.benchmarks or arguments.dataset_name):
        raise ValueError(
            f"benchmarks: got {unknown or 'none, and no dataset_name'}, expected some of {list(BENCHMARKS)}. For other problems, give "
            "dataset_name."
        )
    chosen = {
        name: value for name in SamplingProtocol.__dataclass_fields__ if (value := getattr(sampling, name)) is not None
    }
    protocols = {name: replace(BENCHMARKS[name].protocol, **chosen) for name in arguments.benchmarks}
    own_protocol = SamplingProtocol(**chosen)
    for protocol in [*protocols.values(), *([own_protocol] if arguments.dataset_name else [])]:
        if sampling.ks and not 1 <= min(sampling.ks) <= max(sampling.ks) <= protocol.num_samples:
            raise ValueError(
                f"pass@k needs 1 <= k <= num_samples = {protocol.num_samples}, got ks={sampling.ks}. Set num_samples and temperature."
            )
    tasks = [load_benchmark(name, arguments, protocol) for name, protocol in protocols.items()]
    return tasks + ([load_own(arguments, own_protocol)] if arguments.dataset_name else [])


def load_benchmark(name: str, arguments: ProblemArguments, protocol: SamplingProtocol) -> Task:
    benchmark = BENCHMARKS[name]
    where = (benchmark.dataset, benchmark.config, benchmark.split)
    rows = first(choose_split(read_splits(*where), benchmark.split, "dataset_split"), arguments.max_problems)
    instruction = arguments.instruction
    if instruction is None and arguments.system_prompt is not None and benchmark.instruction == MATH:
        instruction = ""  # which the system prompt gives, as in training
    problems = Dataset.from_list([as_problem(benchmark, row, i, instruction) for i, row in enumerate(rows)])
    return Task(name, *where, in_form(problems, arguments), benchmark.reward_func, protocol)


def load_own(arguments: ProblemArguments, protocol: SamplingProtocol) -> Task:
    """A dataset of the user's."""
    script = ScriptArguments(
        dataset_name=arguments.dataset_name,
        dataset_config=arguments.dataset_config,
        dataset_train_split=arguments.dataset_split,  # what a single file becomes
        prompt_column=arguments.prompt_column,
    )
    rows = first(choose_split(load_splits(script), arguments.dataset_split, "dataset_split"), arguments.max_problems)
    reward_func = load_reward(arguments.reward_func) if arguments.reward_func else boxed_accuracy_reward
    if arguments.answer_column in rows.column_names:
        rows = rows.map(lambda row: {"solution": row[arguments.answer_column]}, desc="answers")
    elif reward_func is boxed_accuracy_reward or arguments.answer_column != "solution":
        raise ValueError(
            f"The dataset has no column {arguments.answer_column!r}, only {rows.column_names}: set answer_column, or give a reward_func that "
            "does without."
        )
    if arguments.instruction:
        rows = rows.map(
            lambda row: {"prompt": with_instruction(row["prompt"], arguments.instruction)}, desc="instructions"
        )
    path = Path(arguments.dataset_name)
    name = re.sub(r"[^\w.-]+", "_", path.resolve().stem if path.exists() else arguments.dataset_name)
    dataset = path.name if path.exists() else arguments.dataset_name
    where = (dataset, arguments.dataset_config, arguments.dataset_split)
    return Task(name, *where, in_form(rows, arguments), reward_func, protocol)


def with_instruction(prompt: str | list[dict], instruction: str) -> str | list[dict]:
    """At the end of a text, or of the last message."""
    if isinstance(prompt, str):
        return f"{prompt}\n\n{instruction}"
    *before, last = prompt
    return [*before, {**last, "content": f"{last['content']}\n\n{instruction}"}]


def first(rows: Dataset, num: int | None) -> Dataset:
    return rows if num is None else rows.select(range(min(num, len(rows))))


def in_form(problems: Dataset, arguments: ProblemArguments) -> Dataset:
    """Text prompts as conversations, where these are asked for."""
    if arguments.system_prompt is None and not arguments.apply_chat_template:
        return problems

    def form(row: dict) -> dict:
        prompt = row["prompt"]
        return {"prompt": as_conversation(prompt, arguments.system_prompt) if isinstance(prompt, str) else prompt}

    return problems.map(form, desc="prompts")
