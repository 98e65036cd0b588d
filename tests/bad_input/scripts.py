"""What is wrong with an evaluation or a collection: named before anything is written."""

import contextlib
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.bad_input.case import Case, Error
from tests.recipes import test_collect_expert_completions, test_evaluate
from tests.training import POLICY, QUICKSTART, path_dataset

RECIPES = QUICKSTART.parent


def run(script: str, arguments: list[str], folder: Path) -> None:
    """A recipe as `python` runs it, but in this process, beside problems and rewards."""
    test_evaluate.write(folder / "problems.jsonl", path_dataset(2))
    test_evaluate.write(folder / "folder" / "train.jsonl", path_dataset(1))
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [script, *arguments], [str(QUICKSTART), str(RECIPES), *path]
    try:
        with contextlib.chdir(folder):
            runpy.run_path(str(RECIPES / script), run_name="__main__")
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
            evaluation("`--benchmarks math500 aime23`", {"benchmarks": ["math500", "aime23"]}, "benchmarks: got ['aime23'], expected some of ['math500', 'aime24', 'aime25', 'amc', 'minerva', 'olympiadbench', 'gpqa_diamond', 'mmlu_pro', 'arc_challenge']. For other problems, give dataset_name."),
            evaluation("no model", {"model_name_or_path": None}, "Expected a model and a folder for its results, got model_name_or_path=None and output_dir='out'. Set both."),
            evaluation("`--model_name_or_path absent`", {"model_name_or_path": "absent"}, "model_name_or_path: no tokenizer of 'absent' can be loaded. Expected a Hub id, or a folder with a model and its tokenizer. …"),
            evaluation("`--backend sglang`", {"backend": "sglang"}, "backend: got 'sglang', expected one of ['transformers', 'vllm']."),
            evaluation("`--num_samples 4` without a temperature", {"temperature": None}, "At temperature 0 all of num_samples=4 completions of a problem would be the same. Set temperature, or num_samples=1."),
            evaluation("`--top_p 0`", {"top_p": 0}, "Expected num_samples >= 1, max_completion_length >= 1, temperature >= 0 and 0 < top_p <= 1, got 4, 26, 1.0 and 0.0."),
            evaluation("`--ks 1 8` with `--num_samples 4`", {"ks": [1, 8]}, "pass@k needs 1 <= k <= num_samples = 4, got ks=[1, 8]. Set num_samples and temperature."),
            evaluation("`--batch_size 0`", {"batch_size": 0}, "Expected grading_timeout >= 0 and batch_size >= 1, got 10.0 and 0."),
            evaluation("no column of answers", {"reward_func": None}, "The dataset has no column 'solution', only ['prompt', 'walls', 'start', 'goal']: set answer_column, or give a reward_func that does without."),
            evaluation("`--reward_func absent.correct`", {"reward_func": "absent.correct"}, "reward_funcs: 'absent.correct' cannot be imported, No module named 'absent'. Expected `package.module.function`, here or where Python finds it."),
            evaluation("`--prompt_column question`", {"prompt_column": "question"}, "The dataset has no column 'question', only ['goal', 'prompt', 'start', 'walls']: set prompt_column."),
            evaluation("a folder without the split `test`", {"dataset_name": "folder"}, "The dataset has no split 'test', only ['train']: set dataset_split. A folder with train.jsonl and test.jsonl has two."),
            evaluation("`--system_prompt Hello`, and no chat template", {"system_prompt": "Hello"}, "The tokenizer of expert has no chat template, which prompts that are conversations need. Give one as chat_template, or leave system_prompt and apply_chat_template unset."),
            evaluation("`--eos_token <|im_end|>`", {"eos_token": "<|im_end|>"}, "eos_token='<|im_end|>' is not in the vocabulary of …quickstart/expert."),
            evaluation("`--nonsense 1`", {"nonsense": 1}, "Some specified arguments are not used by the HfArgumentParser: ['--nonsense', '1']"),
        ],
    ),
    "Collection of expert completions": (
        "With `recipes/collect_expert_completions.py`.",
        [
            collection("`--dataset_train_split x`", {"dataset_train_split": "x", "dataset_name": "folder"}, "The dataset has no split 'x', only ['train']: set dataset_train_split. A folder with train.jsonl and test.jsonl has two."),
            collection("`--reward_funcs nobody`", {"reward_funcs": "nobody"}, "reward_funcs: got 'nobody', expected one of ['boxed_accuracy', 'think_boxed_format'] or `package.module.function`."),
            collection("`--nonsense 1`", {"nonsense": "1"}, "Some specified arguments are not used by the HfArgumentParser: ['--nonsense', '1']"),
            collection("`--temperature 0`", {"temperature": "0"}, "Expected num_completions >= 1, max_completion_length >= 1 and temperature > 0, got 2, 26 and 0.0."),
            collection("`--expert_model_name_or_path nowhere`", {"expert_model_name_or_path": "nowhere"}, "The expert 'nowhere' could not be loaded. Expected a Hub id, a folder with a model, or a model; its weights in safetensors, into which `save_pretrained` puts older ones (or set use_safetensors to False in expert_model_init_kwargs, if you trust them). …"),
            collection("a tokenizer for log-probabilities, and an endpoint", NO_KEYS, "policy_tokenizer_name_or_path='…quickstart/policy' and eos_token=None are for log-probabilities, which are not taken from an endpoint: leave them unset, or leave base_url unset."),
        ],
    ),
}  # fmt: skip
