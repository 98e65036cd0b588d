"""Train with selective guidance: the one script of all recipes.

    accelerate launch recipes/selective_grpo.py --config recipes/Qwen2.5-3B/mentor/config.yaml

Settings come from the YAML file, and from the command line, which wins: those of `ScriptArguments` below, of SelectiveGuidanceGRPOConfig
(with all of TRL's GRPOConfig) and of TRL's ModelConfig (dtype, attention, quantisation, PEFT). Without a file:

    accelerate launch recipes/selective_grpo.py \
        --model_name_or_path Qwen/Qwen2.5-3B \
        --expert_model_name_or_path open-r1/OpenR1-Qwen-7B \
        --dataset_name my_problems.jsonl \
        --reward_funcs boxed_accuracy think_boxed_format --reward_weights 0.9 0.1 \
        --num_generations 12 --num_guided_generations 4 \
        --output_dir outputs/Qwen2.5-3B-guided

It writes the model with its tokenizer and card, `trainer_state.json` with all logs, and `training_dynamics.png` to the output folder;
`--push_to_hub` pushes them; `--resume_from_checkpoint true` goes on from the last checkpoint there, `--resume_from_checkpoint <folder>` from
that one.
"""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import RecipeParser, setting
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer
from trl_selective.reporting.names import hub_id
from trl_selective.rewards import boxed_accuracy_reward, think_boxed_format_reward

REWARD_FUNCS = {"boxed_accuracy": boxed_accuracy_reward, "think_boxed_format": think_boxed_format_reward}
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class ScriptArguments:
    dataset_name: str | None = setting(
        "Hub id, local .json/.jsonl/.parquet/.csv file, or folder (of such files, or of `save_to_disk`)."
    )
    dataset_config: str | None = setting("Configuration of a dataset on the Hub.")
    dataset_train_split: str = setting("Split to train on.", "train")
    dataset_test_split: str = setting("Split to evaluate on, where `eval_strategy` is set.", "test")
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
    path = Path(arguments.dataset_name)
    if path.suffix in LOADERS:
        splits = load_dataset(LOADERS[path.suffix], data_files={arguments.dataset_train_split: str(path)})
    elif (path / "dataset_dict.json").exists():
        splits = load_from_disk(str(path))
    elif (path / "state.json").exists():  # what `Dataset.save_to_disk` leaves
        splits = DatasetDict({arguments.dataset_train_split: load_from_disk(str(path))})
    else:
        splits = load_dataset(arguments.dataset_name, name=arguments.dataset_config)
    return splits.map(lambda row: {"prompt": as_prompt(row, arguments)}, desc="prompts")


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
    return [{"role": "system", "content": arguments.system_prompt}, {"role": "user", "content": prompt}]


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


def resume_point(value: str | bool | None) -> str | bool | None:
    """A folder, or whether to look for the last checkpoint. On the command line it arrives as a word."""
    return {"true": True, "false": False}.get(str(value).lower(), value)


def make_trainer(
    arguments: ScriptArguments, args: SelectiveGuidanceGRPOConfig, model: ModelConfig
) -> SelectiveGuidanceGRPOTrainer:
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: give the Hub id or the folder of the policy.")
    splits = load_splits(arguments)
    train_dataset = choose_split(splits, arguments.dataset_train_split, "dataset_train_split")
    eval_dataset = None
    if args.eval_strategy != "no":
        eval_dataset = choose_split(splits, arguments.dataset_test_split, "dataset_test_split")
    reward_funcs = load_rewards(arguments, args)
    try:
        return SelectiveGuidanceGRPOTrainer(
            model=model.model_name_or_path,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_tokenizer(arguments, model, args.trust_remote_code),
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
        )
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: {model.model_name_or_path!r} cannot be loaded, or its tokenizer. Expected a Hub id, or a folder with both. {error}"
        ) from error


def main(
    arguments: ScriptArguments, args: SelectiveGuidanceGRPOConfig, model: ModelConfig, user_errors=nullcontext
) -> None:
    """Train. `user_errors()` surrounds what can fail for a wrong setting."""
    with user_errors():
        trainer = make_trainer(arguments, args, model)
    trainer.train(resume_from_checkpoint=resume_point(args.resume_from_checkpoint))

    trainer.save_state()
    dataset_name = hub_id(arguments.dataset_name)  # a card names what others can load
    if args.push_to_hub:  # saves model, card and picture, too
        trainer.push_to_hub(dataset_name=dataset_name)
    else:
        trainer.save_model()
        trainer.create_model_card(model_name=Path(args.output_dir).resolve().name, dataset_name=dataset_name)
    trainer.accelerator.print(f"Model, card and logs are in {args.output_dir}.")
    trainer.accelerator.end_training()  # closes trackers and the process group


def check_processes(expected: int | None, actual: int) -> None:
    if expected not in (None, actual):
        raise ValueError(
            f"num_processes={expected}: the batch sizes are made for that many processes, got {actual}. Start them with `accelerate launch "
            f"--num_processes {expected}`, or change gradient_accumulation_steps, steps_per_generation and num_processes together."
        )


def parse(argv: list[str]) -> tuple[RecipeParser, RecipeArguments, SelectiveGuidanceGRPOConfig, ModelConfig]:
    kinds = {
        "data, rewards and this script": RecipeArguments,
        "guidance": SelectiveGuidanceGRPOConfig,
        "model, adapter and quantisation (TRL)": ModelConfig,
    }
    parser = RecipeParser(kinds, "Train with selective guidance.")
    if "--dry_run" in argv and not torch.accelerator.is_available():
        argv = [*argv, "--use_cpu", "true"]  # or settings for an accelerator would be refused on a machine without
    return parser, *parser.parse_args_and_config(argv)


if __name__ == "__main__":
    parser, arguments, args, model = parse(sys.argv[1:])
    with parser.user_errors():
        if arguments.dry_run:
            from dry_run import dry_run  # which imports this script

            print(dry_run(arguments, args, model))
            sys.exit()
        check_processes(arguments.num_processes, args.world_size)
    main(arguments, args, model, parser.user_errors)
