r"""Make the data of the recipes: JSON Lines with the columns `problem` and `solution`, and `expert_completions` where there are any.

    python recipes/prepare_data.py --task math --output_file data/math_levels_3_to_5.jsonl
    python recipes/prepare_data.py --task openr1 --tokenizer_name_or_path Qwen/Qwen2.5-3B --output_file data/openr1_easy.jsonl
    python recipes/prepare_data.py --task sft --tokenizer_name_or_path meta-llama/Llama-3.1-8B-Instruct \
        --output_file data/llama_expert/train.jsonl

`math`: the problems of MATH of levels 3 to 5 without those of MATH-500 (arXiv:2510.04140, section 4.1: 8,889 problems). `openr1`: the problems
of OpenR1-Math-220k with a verified response of less than 4,000 tokens, and these responses (the data of the paper's Llama). `sft`: the same
as prompts and completions, to train an expert on. Problems of MATH-500 are left out of all three.

Rows are read one at a time from the Hub, or from a local file or folder (`--dataset_name`, `--heldout_name`). The output appears when it is
complete.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from command_line import RecipeParser, setting
from datasets import load_dataset
from loading import LOADERS, as_conversation
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from trl_selective.boxed_answers import last_boxed
from trl_selective.resuming import replacing

DATASETS = {
    "math": "DigitalLearningGmbH/MATH-lighteval",
    "openr1": "open-r1/OpenR1-Math-220k",
    "sft": "open-r1/OpenR1-Math-220k",
}
SPLITS = {
    "math": ["train", "test"],
    "openr1": ["train"],
    "sft": ["train"],
}  # of both of MATH: its train split alone has too few problems
LEVELS = ("Level 3", "Level 4", "Level 5")
SYSTEM_PROMPT = "Think about the problem first, between <think> and </think>. Then give the answer, in \\boxed{}."


@dataclass
class DataArguments:
    task: Literal["math", "openr1", "sft"] = field(metadata={"help": "Which data to make."})
    output_file: str = field(metadata={"help": "JSON Lines file to write."})
    dataset_name: str | None = setting(
        "Hub id, file or folder with the columns of the original; default: the original."
    )
    dataset_splits: list[str] | None = setting(
        "Splits to read; default: train and test of MATH, train of OpenR1-Math-220k."
    )
    heldout_name: str = setting("Hub id, file or folder whose problems are left out.", "HuggingFaceH4/MATH-500")
    heldout_split: str = setting("Its split.", "test")
    tokenizer_name_or_path: str | None = setting("Tokenizer that measures responses; needed for openr1 and sft.")
    max_response_tokens: int = setting("Responses with this many tokens or more are left out.", 4000)
    max_completions: int = setting("Responses kept of each problem, the shortest first.", 4)
    system_prompt: str = setting("System message of the prompts for sft.", SYSTEM_PROMPT)


def read_rows(name: str, split: str) -> Iterable[dict]:
    """The rows of a split, one at a time.

    Raises:
        ValueError: if there is no such data.
    """
    path = Path(name)
    try:
        if path.suffix in LOADERS:
            return load_dataset(LOADERS[path.suffix], data_files={split: str(path)}, split=split, streaming=True)
        return load_dataset(name, split=split, streaming=True)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"The split {split!r} of {name!r} could not be read: {error} Expected an id on a Hub that can be reached, or a local "
            f"{', '.join(LOADERS)} file, or a folder of such files called {split}."
        ) from error


def checked(rows: Iterable[dict], columns: Iterable[str], name: str) -> Iterator[dict]:
    """The same rows.

    Raises:
        ValueError: if one lacks a column.
    """
    for index, row in enumerate(rows):
        if missing := [column for column in columns if column not in row]:
            raise ValueError(f"Row {index} of {name!r} has no column {missing[0]!r}, only {sorted(row)}.")
        yield row


def normalised(problem: str) -> str:
    """A problem without case, blanks and LaTeX spacing, which differ between copies of MATH."""
    text = problem.lower()
    for spacing in ("\\!", "\\,", "\\;", "\\ ", "\\left", "\\right", "$", "~"):
        text = text.replace(spacing, "")
    return "".join(text.replace("dfrac", "frac").replace("tfrac", "frac").split())


def unseen(rows: Iterable[dict], heldout: set[str], count: Counter) -> Iterator[dict]:
    """The rows whose problem is neither held out nor repeated."""
    seen: set[str] = set()
    for row in rows:
        key = normalised(row["problem"])
        reason = "held out" if key in heldout else "repeated" if key in seen else None
        seen.add(key)
        if reason is None:
            yield row
        else:
            count[reason] += 1


# ---- The three tasks -------------------------------------------------------------------------------------------------------------------


def math_row(row: dict, count: Counter) -> dict | None:
    """A problem of the right level with the answer that its solution boxes."""
    if row["level"] not in LEVELS:
        count["of another level"] += 1
        return None
    if (answer := last_boxed(row["solution"])) is None:
        count["without a boxed answer"] += 1
        return None
    return {"problem": row["problem"], "solution": answer}


def verified(row: dict) -> list[str]:
    """The complete responses that Math-Verify found right, or else a judge: where the one has no verdict, the other has."""
    verdicts = [row.get("correctness_math_verify"), row.get("correctness_llama")]
    return [
        response
        for number, response in enumerate(row["generations"])
        if row["is_reasoning_complete"][number] and any(verdict and verdict[number] for verdict in verdicts)
    ]


def openr1_row(row: dict, count: Counter, length: Callable[[str], int], arguments: DataArguments) -> dict | None:
    """A problem with its verified responses that are short enough."""
    responses = verified(row)
    lengths = {response: length(response) for response in responses}
    short = sorted((r for r in lengths if lengths[r] < arguments.max_response_tokens), key=lengths.__getitem__)
    if not short:
        count["without a short response" if responses else "without a verified response"] += 1
        return None
    return {
        "problem": row["problem"],
        "solution": row["answer"],
        "expert_completions": short[: arguments.max_completions],
    }


def sft_rows(row: dict, system_prompt: str) -> Iterator[dict]:
    prompt = as_conversation(row["problem"], system_prompt)
    for completion in row["expert_completions"]:
        yield {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}


def prepared(arguments: DataArguments, count: Counter) -> Iterator[dict]:
    """The rows of the output, in the order of the input.

    Raises:
        ValueError: if data or tokenizer is missing.
    """
    task, name = arguments.task, arguments.dataset_name or DATASETS[arguments.task]
    columns = (
        ["problem", "solution", "level"]
        if task == "math"
        else ["problem", "answer", "generations", "is_reasoning_complete"]
    )
    length = None if task == "math" else token_counter(arguments.tokenizer_name_or_path)
    held = checked(read_rows(arguments.heldout_name, arguments.heldout_split), ["problem"], arguments.heldout_name)
    heldout = {normalised(row["problem"]) for row in held}
    splits = arguments.dataset_splits or SPLITS[task]
    rows = chain.from_iterable(checked(read_rows(name, split), columns, name) for split in splits)
    for row in unseen(tqdm(rows, desc=name, unit=" rows"), heldout, count):
        made = math_row(row, count) if length is None else openr1_row(row, count, length, arguments)
        if made is not None:
            count["kept"] += 1
            yield from sft_rows(made, arguments.system_prompt) if task == "sft" else [made]


def token_counter(name: str | None) -> Callable[[str], int]:
    if name is None:
        raise ValueError(
            "tokenizer_name_or_path is not set: responses are measured in tokens, name the policy's tokenizer."
        )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def write(rows: Iterable[dict], path: Path) -> int:
    """Write all rows or nothing: the file appears when the last one is there.

    Raises:
        ValueError: if there is no row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    with replacing(path) as partial:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                number += 1
        if not number:
            raise ValueError(f"No row is left for {path}: it was not written. Look at dataset_name and its columns.")
    return number


def main(arguments: DataArguments) -> str:
    """Make the data; the summary."""
    count: Counter = Counter()
    number = write(prepared(arguments, count), Path(arguments.output_file))
    left_out = "".join(f"\n  {amount} {reason}" for reason, amount in count.items() if reason != "kept")
    return f"{number} rows are in {arguments.output_file}, of {count['kept']} problems. Left out:{left_out or ' none'}"


if __name__ == "__main__":
    parser = RecipeParser({"settings": DataArguments}, "Make the data of the recipes.")
    (arguments,) = parser.parse_args_and_config(sys.argv[1:])
    with parser.user_errors():
        print(main(arguments))
