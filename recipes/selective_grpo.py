"""Train with selective guidance: the one script of all recipes.

    accelerate launch recipes/selective_grpo.py --config recipes/Qwen2.5-3B/mentor/config.yaml

Settings come from the YAML file, and from the command line, which wins: those of `RecipeArguments` (`loading.py`), of SelectiveGuidanceGRPOConfig
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

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from command_line import RecipeParser
from dry_run import dry_run
from loading import RecipeArguments, ScriptArguments, choose_split, load_rewards, load_splits, load_tokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_selective import SelectiveGuidanceGRPOConfig, SelectiveGuidanceGRPOTrainer
from trl_selective.reporting.names import hub_id


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
            print(dry_run(arguments, args, model))
            sys.exit()
        check_processes(arguments.num_processes, args.world_size)
    main(arguments, args, model, parser.user_errors)
