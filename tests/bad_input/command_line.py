"""What is wrong with a config file or an argument of `recipes/selective_grpo.py`: it ends with code 2 and one line that names the place."""

import contextlib
import io
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.case import Case, Error
from tests.recipes.test_selective_grpo import SCRIPT, prepare
from tests.training import path_dataset

CPU = "use_cpu: true\nbf16: false\n"


class Said(Exception):
    """What stands behind "error: ", without the line that names the help."""


def run(*arguments: str) -> None:
    """The script as `python recipes/selective_grpo.py` runs it, but in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        _as_command(arguments),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit,
    ):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit.value.code == 2
    said, _, more = err.getvalue().rpartition(": error: ")[2].rpartition("\nAll settings: ")
    assert more
    raise Said(said)


@contextlib.contextmanager
def _as_command(arguments: tuple[str, ...]) -> Iterator[None]:
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = ["selective_grpo.py", *arguments], [*path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


def in_file(text: str, says: str) -> Case:
    """A config file with these lines behind two others."""

    def cause(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(CPU + text)
        with contextlib.chdir(folder):
            run("--config", "recipe.yaml", "--dry_run")

    return Error(f"`{text}`".replace("\n", "`<br>`"), cause, says, Said)


def argument(arguments: str, says: str, given: str | None = None) -> Case:
    """Beside a config file that is right, with two rewards and a dataset."""

    def cause(folder: Path) -> None:
        prepare(folder)
        path_dataset(2).save_to_disk(str(folder / "one"))
        with contextlib.chdir(folder):
            run("--config", "config.yaml", *arguments.split())

    return Error(given or f"`{arguments}`", cause, says, Said)


SECTIONS = {
    "Config files": (
        "Of `recipes/selective_grpo.py`, which ends with code 2. Here, two lines stand before what is given.",
        [
            in_file("learning_rte: 1.0", "recipe.yaml, line 3, learning_rte: there is no such setting. Did you mean 'learning_rate'?"),
            in_file("zzz: 1", "recipe.yaml, line 3, zzz: there is no such setting."),
            in_file("max_steps: 1\nseed: 2\nmax_steps: 3", "recipe.yaml, line 5: 'max_steps' is there already, in line 3. Keep one."),
            in_file("max_steps: many", "recipe.yaml, line 3, max_steps: expected a whole number, got 'many'."),
            in_file("max_steps: 1.5", "recipe.yaml, line 3, max_steps: expected a whole number, got 1.5."),
            in_file("max_steps: true", "recipe.yaml, line 3, max_steps: expected a whole number, got True. YAML reads yes, no, on and off as true and false: put a word in quotes."),
            in_file("log_completions: 3", "recipe.yaml, line 3, log_completions: expected true or false, got 3."),
            in_file("save_strategy: no", "recipe.yaml, line 3, save_strategy: expected one of ['no', 'steps', 'epoch', 'best'] or a text, got False. YAML reads yes, no, on and off as true and false: put a word in quotes."),
            in_file("reward_weights: [1.0, x]", "recipe.yaml, line 3, reward_weights: expected a list, each entry a number or null, got [1.0, 'x']."),
            in_file("reward_funcs: boxed_accuracy", "recipe.yaml, line 3, reward_funcs: expected a list, each entry a text or null, got 'boxed_accuracy'."),
            in_file("entropy_quantile: 95", "recipe.yaml, line 3, entropy_quantile: entropy_quantile must lie in [0, 1], got 95. It is a fraction: pass 0.95 for the 95th percentile."),
            in_file("preset: mentr", "recipe.yaml, line 3, preset: preset must be one of ['luffy', 'mentor', 'mentor_as_released', 'mentor_corrected', 'selective'], got 'mentr'."),
            in_file("seed: 1\nnum_generations: 4\nnum_guided_generations: 3", "recipe.yaml, line 5, num_guided_generations: num_guided_generations=3 of num_generations=4 leaves 1 on-policy rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or raise num_generations."),
            in_file("seed: [1", "recipe.yaml, line 3: no valid YAML, expected ',' or ']', but got '<stream end>'."),
        ],
    ),
    "The command line": (
        "Of the same script.",
        [
            argument("--entropy_quantile 95", "command line, --entropy_quantile: entropy_quantile must lie in [0, 1], got 95. It is a fraction: pass 0.95 for the 95th percentile."),
            argument("--max_step 1", "command line, --max_step: there is no such setting. Did you mean '--max_steps'?"),
            argument("--max_steps many", "argument --max_steps/--max-steps: invalid int value: 'many'"),
            argument("--expert_model_init_kwargs {dtype", "command line, --expert_model_init_kwargs: expected JSON, got '{dtype': Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
            argument("--num_guided_generations 3", "command line, --num_guided_generations: num_guided_generations=3 of num_generations=4 leaves 1 on-policy rollouts per prompt, but their mean and standard deviation are the baseline: at least 2 are needed. Guide or inject fewer, or raise num_generations."),
            argument("--num_processes 8", "command line, --num_processes: num_processes=8: the batch sizes are made for that many processes, got 1. Start them with `accelerate launch --num_processes 8`, or change gradient_accumulation_steps, steps_per_generation and num_processes together."),
            argument("--reward_funcs correct", "command line, --reward_funcs: got 'correct', expected one of ['boxed_accuracy', 'think_boxed_format'] or `package.module.function`."),
            argument("--reward_funcs my_reward.absent my_reward.half", "command line, --reward_funcs: 'my_reward.absent' cannot be imported, module 'my_reward' has no attribute 'absent'. Expected `package.module.function`, here or where Python finds it."),
            argument("--reward_funcs absent.letters my_reward.half", "command line, --reward_funcs: 'absent.letters' cannot be imported, No module named 'absent'. Expected `package.module.function`, here or where Python finds it."),
            argument("--reward_funcs my_reward.letters", "Number of reward weights (2) must match number of reward functions (1)", "`--reward_funcs my_reward.letters`, with two `reward_weights`"),
            argument("--prompt_column question", "command line, --prompt_column: The dataset has no column 'question', only ['goal', 'prompt', 'start', 'walls']: set prompt_column."),
            argument("--eos_token <|im_end|>", "command line, --eos_token: eos_token='<|im_end|>' is not in the vocabulary of …quickstart/policy."),
            argument("--dataset_name absent.jsonl", "Unable to find '…/absent.jsonl'"),
            argument("--eval_strategy steps", "The dataset has no split 'test', only ['train']: set dataset_test_split. A folder with train.jsonl and test.jsonl has two."),
            argument("--dataset_name one --eval_strategy steps", "The dataset has no split 'test', only ['train']: set dataset_test_split. A folder with train.jsonl and test.jsonl has two."),
            argument("--model_name_or_path absent", "command line, --model_name_or_path: 'absent' cannot be loaded, or its tokenizer. Expected a Hub id, or a folder with both. …"),
            argument("--config absent.yaml", "absent.yaml: the config file cannot be read, No such file or directory."),
        ],
    ),
}  # fmt: skip
