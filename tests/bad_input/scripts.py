"""What is wrong with an evaluation or a collection: named before anything is written."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, Error
from tests.recipes import test_collect_expert_completions, test_evaluate
from tests.training import POLICY, QUICKSTART, path_dataset

RECIPES = QUICKSTART.parent


def run(script: str, arguments: list[str], folder: Path) -> None:
    """A recipe as `python` runs it, but in this process, beside problems and rewards. What it says before it ends is raised."""
    test_evaluate.write(folder / "problems.jsonl", path_dataset(2))
    test_evaluate.write(folder / "folder" / "train.jsonl", path_dataset(1))
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [script, *arguments], [str(QUICKSTART), str(RECIPES), *path]
    said = io.StringIO()
    try:
        with contextlib.chdir(folder), contextlib.redirect_stderr(said):
            runpy.run_path(str(RECIPES / script), run_name="__main__")
    except SystemExit:
        _, message = said.getvalue().split(f"{script}: error: ")
        raise ValueError(message.removesuffix(f"\nAll settings: {script} --help\n")) from None
    finally:
        sys.argv, sys.path = argv, path
        assert {entry.name for entry in folder.iterdir()} == {"problems.jsonl", "folder"}


def named(given: str, changes: dict[str, Any], says: str, script: str, options) -> Case:
    return Error(given, lambda folder: run(script, options(**changes), folder), says)


def evaluation(given: str, changes: dict[str, Any], says: str) -> Case:
    return named(given, changes, says, "evaluate.py", test_evaluate.command_line)


def collection(given: str, changes: dict[str, Any], says: str) -> Case:
    return named(given, changes, says, "collect_expert_completions.py", test_collect_expert_completions.command_line)


NO_KEYS = {"base_url": "http://localhost:1", "policy_tokenizer_name_or_path": POLICY}

SECTIONS = {
    "Evaluation": (
        "With `recipes/evaluate.py`. One answer that takes longer to grade than `--grading_timeout` counts as wrong, and is listed.",
        [
            evaluation("neither benchmarks nor a dataset", {"dataset_name": None}, "benchmarks: got none, and no dataset_name, expected some of ['math500', 'aime24', 'aime25', 'amc', 'minerva', 'olympiadbench', 'gpqa_diamond', 'mmlu_pro', 'arc_challenge']. For other problems, give dataset_name."),
            evaluation("`--benchmarks math500 aime23`", {"benchmarks": ["math500", "aime23"]}, "command line, --benchmarks: got ['aime23'], expected some of ['math500', 'aime24', 'aime25', 'amc', 'minerva', 'olympiadbench', 'gpqa_diamond', 'mmlu_pro', 'arc_challenge']. For other problems, give dataset_name."),
            evaluation("no model", {"model_name_or_path": None}, "model_name_or_path is not set: give the Hub id or the folder of a model, or of a LoRA adapter."),
            evaluation("`--model_name_or_path absent`", {"model_name_or_path": "absent"}, "command line, --model_name_or_path: no tokenizer of 'absent' can be loaded. Expected a Hub id, or a folder with a model and its tokenizer. …"),
            evaluation("`--backend sglang`", {"backend": "sglang"}, "command line, --backend: got 'sglang', expected one of ['transformers', 'vllm']."),
            evaluation("`--num_samples 4` without a temperature", {"temperature": None}, "command line, --num_samples: At temperature 0 all of num_samples=4 completions of a problem would be the same. Set temperature, or num_samples=1."),
            evaluation("`--top_p 0`", {"top_p": 0}, "command line, --top_p: top_p must be above 0, and at most 1, got 0.0."),
            evaluation("`--ks 1 8` with `--num_samples 4`", {"ks": [1, 8]}, "command line, --num_samples: pass@k needs 1 <= k <= num_samples = 4, got ks=[1, 8]. Set num_samples and temperature."),
            evaluation("`--batch_size 0`", {"batch_size": 0}, "command line, --batch_size: batch_size must be at least 1, got 0."),
            evaluation("no column of answers", {"reward_func": None}, "The dataset has no column 'solution', only ['prompt', 'walls', 'start', 'goal']: set answer_column, or give a reward_func that does without."),
            evaluation("`--reward_func absent.correct`", {"reward_func": "absent.correct"}, "reward_funcs: 'absent.correct' cannot be imported, No module named 'absent'. Expected `package.module.function`, here or where Python finds it."),
            evaluation("`--prompt_column question`", {"prompt_column": "question"}, "command line, --prompt_column: The dataset has no column 'question', only ['goal', 'prompt', 'start', 'walls']: set prompt_column."),
            evaluation("a folder without the split `test`", {"dataset_name": "folder"}, "The dataset has no split 'test', only ['train']: set dataset_split. A folder with train.jsonl and test.jsonl has two."),
            evaluation("`--system_prompt Hello`, and no chat template", {"system_prompt": "Hello"}, "command line, --system_prompt: The tokenizer of expert has no chat template, which prompts that are conversations need. Give one as chat_template, or leave system_prompt and apply_chat_template unset."),
            evaluation("`--eos_token <|im_end|>`", {"eos_token": "<|im_end|>"}, "command line, --eos_token: eos_token='<|im_end|>' is not in the vocabulary of …quickstart/expert."),
            evaluation("`--sed 1`", {"sed": 1}, "command line, --sed: there is no such setting. Did you mean '--seed'?"),
        ],
    ),
    "Collection of expert completions": (
        "With `recipes/collect_expert_completions.py`.",
        [
            collection("`--dataset_train_split x`", {"dataset_train_split": "x", "dataset_name": "folder"}, "command line, --dataset_train_split: The dataset has no split 'x', only ['train']: set dataset_train_split. A folder with train.jsonl and test.jsonl has two."),
            collection("`--reward_funcs nobody`", {"reward_funcs": "nobody"}, "command line, --reward_funcs: got 'nobody', expected one of ['boxed_accuracy', 'think_boxed_format'] or `package.module.function`."),
            collection("`--sed 1`", {"sed": "1"}, "command line, --sed: there is no such setting. Did you mean '--seed'?"),
            collection("`--temperature 0`", {"temperature": "0"}, "command line, --temperature: temperature must be above 0, got 0.0."),
            collection("`--expert_model_name_or_path nowhere`", {"expert_model_name_or_path": "nowhere"}, "The expert 'nowhere' could not be loaded. Expected a Hub id, a folder with a model, or a model; its weights in safetensors, into which `save_pretrained` puts older ones (or set use_safetensors to False in expert_model_init_kwargs, if you trust them). …"),
            collection("a tokenizer for log-probabilities, and an endpoint", NO_KEYS, "command line, --policy_tokenizer_name_or_path: policy_tokenizer_name_or_path='…quickstart/policy': that is for log-probabilities, which are not taken from an endpoint. Leave it unset, or leave base_url unset."),
        ],
    ),
}  # fmt: skip
