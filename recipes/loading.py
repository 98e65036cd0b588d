"""What several scripts are told and load: the settings of dataset, rewards and tokenizer, and what they name."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from command_line import setting
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_selective import SelectiveGuidanceGRPOConfig
from trl_selective.rewards import boxed_accuracy_reward, think_boxed_format_reward

REWARD_FUNCS = {"boxed_accuracy": boxed_accuracy_reward, "think_boxed_format": think_boxed_format_reward}
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class ScriptArguments:
    dataset_name: str | None = setting(
        "Hub id, local .json/.jsonl/.parquet/.csv file, or folder (of such files, or of `save_to_disk`)."
    )
    dataset_config: str | None = setting("Configuration of a dataset on the Hub.")
    dataset_train_split: str = setting("Split with the problems.", "train")
    reward_funcs: list[str] | None = setting(
        f"Names out of {list(REWARD_FUNCS)}, or `package.module.function`, also of files here."
    )
    prompt_column: str = setting("Column with the problem: a text or a conversation.", "prompt")
    system_prompt: str | None = setting("Turns text prompts into conversations that start with this system message.")
    tokenizer_name_or_path: str | None = setting(
        "Tokenizer of the policy, where it is not beside its weights: one with a chat template."
    )
    eos_token: str | None = setting("End token of the policy's tokenizer, where it must be the expert's.")


@dataclass
class RecipeArguments(ScriptArguments):
    dataset_test_split: str = setting("Split to evaluate on, where `eval_strategy` is set.", "test")
    num_processes: int | None = setting(
        "Number of processes that the batch sizes are made for; another number is refused."
    )
    dry_run: bool = setting("Check the settings, and print them with an estimate of memory; nothing is loaded.", False)
    memory_gib: float | None = setting("Memory of one device, for --dry_run; unset: of an accelerator here, else 80.")


def load_rewards(arguments: ScriptArguments, args: SelectiveGuidanceGRPOConfig) -> list[Callable]:
    """The reward functions. `correctness_reward` may name one as `reward_funcs` does."""
    rewards = {name: load_reward(name) for name in arguments.reward_funcs or ()}
    if args.correctness_reward in rewards:
        args.correctness_reward = rewards[args.correctness_reward].__name__
    return [rewards[name] for name in arguments.reward_funcs or ()]


def load_reward(name: str) -> Callable:
    """A reward function by its short name, or by its dotted path from the working directory or any importable place."""
    if name in REWARD_FUNCS:
        return REWARD_FUNCS[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ValueError(
            f"reward_funcs: got {name!r}, expected one of {list(REWARD_FUNCS)} or `package.module.function`."
        )
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (AttributeError, ImportError) as error:
        raise ValueError(
            f"reward_funcs: {name!r} cannot be imported, {error}. Expected `package.module.function`, here or where Python finds it."
        ) from error


def load_splits(arguments: ScriptArguments) -> DatasetDict:
    """The dataset, with prompts in the column `prompt`."""
    if arguments.dataset_name is None:
        raise ValueError("dataset_name is not set: give a Hub id, a file or a folder.")
    splits = read_splits(arguments.dataset_name, arguments.dataset_config, arguments.dataset_train_split)
    return splits.map(lambda row: {"prompt": as_prompt(row, arguments)}, desc="prompts")


def read_splits(name: str, config: str | None, split: str) -> DatasetDict:
    """A dataset as it is. Where it has one split without a name, that is `split`."""
    path = Path(name)
    if path.suffix in LOADERS:
        return load_dataset(LOADERS[path.suffix], data_files={split: str(path)})
    if (path / "dataset_dict.json").exists():
        return load_from_disk(str(path))
    if (path / "state.json").exists():  # what `Dataset.save_to_disk` leaves
        return DatasetDict({split: load_from_disk(str(path))})
    return load_dataset(name, name=config)


def choose_split(splits: DatasetDict, name: str, setting: str) -> Dataset:
    if name not in splits:
        raise ValueError(
            f"The dataset has no split {name!r}, only {list(splits)}: set {setting}. A folder with train.jsonl and test.jsonl has two."
        )
    return splits[name]


def as_prompt(row: dict, arguments: ScriptArguments) -> str | list[dict]:
    if arguments.prompt_column not in row:
        raise ValueError(
            f"The dataset has no column {arguments.prompt_column!r}, only {sorted(row)}: set prompt_column."
        )
    prompt = row[arguments.prompt_column]
    if arguments.system_prompt is None or not isinstance(prompt, str):
        return prompt
    return as_conversation(prompt, arguments.system_prompt)


def as_conversation(text: str, system_prompt: str | None) -> list[dict]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]


def load_tokenizer(
    arguments: ScriptArguments, model: ModelConfig, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The policy's tokenizer, if it is another one or has another end token; None leaves loading it to the trainer."""
    if arguments.eos_token is None and arguments.tokenizer_name_or_path is None:
        return None
    name = arguments.tokenizer_name_or_path or model.model_name_or_path
    revision = model.model_revision if name == model.model_name_or_path else None
    tokenizer = AutoTokenizer.from_pretrained(
        name, revision=revision, padding_side="left", trust_remote_code=trust_remote_code
    )
    if arguments.eos_token is None:
        return tokenizer
    if arguments.eos_token not in tokenizer.get_vocab():
        raise ValueError(f"eos_token={arguments.eos_token!r} is not in the vocabulary of {name}.")
    tokenizer.eos_token = arguments.eos_token
    return tokenizer
