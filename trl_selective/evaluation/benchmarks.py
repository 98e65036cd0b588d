r"""The benchmarks of MENTOR (arXiv:2510.04140): where they are on the Hub, what their rows look like, and how the paper samples them.

Every row becomes a `prompt`, which asks for the answer in `\boxed{}`, and a `solution`. The paper names the benchmarks, not the uploads: these are
the usual ones, whose numbers of problems (`num_problems`) are those of the literature.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from trl_selective.evaluation.protocol import SamplingProtocol
from trl_selective.rewards import boxed_accuracy_reward, boxed_choice_reward

Row = Mapping[str, Any]

GREEDY = SamplingProtocol(num_samples=1, temperature=0.0)
AVG_32 = SamplingProtocol(
    num_samples=32, temperature=0.6
)  # exams of 30 to 83 problems, which one sample each would leave to chance

MATH = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = "Please reason step by step, and put the letter of the right option within \\boxed{}."


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on the Hub.

    Attributes:
        dataset, config, split: where it is.
        num_problems: how many it has there.
        columns: those that a row must have.
        convert: a row, and its number, to the problem's text and the solution.
        reward_func: compares an answer with the column `solution`.
        instruction: the end of each prompt.
        protocol: the paper's.
    """

    dataset: str
    config: str | None
    split: str
    num_problems: int
    columns: tuple[str, ...]
    convert: Callable[[Row, int], tuple[str, str]]
    reward_func: Callable = boxed_accuracy_reward
    instruction: str = MATH
    protocol: SamplingProtocol = GREEDY


def plain(prompt: str, answer: str) -> dict[str, Any]:
    """The `columns` and `convert` of a benchmark whose rows have a problem and its answer, a text or a number, in these columns."""

    def convert(row: Row, index: int) -> tuple[str, str]:
        value = row[answer]
        return row[prompt], str(int(value) if isinstance(value, float) and value.is_integer() else value)

    return {"columns": (prompt, answer), "convert": convert}


def minerva(row: Row, index: int) -> tuple[str, str]:
    """Some answers are written as Python writes them: `np.arcsin(10/13)`, `-1./3`."""
    return row["question"], re.sub(r"(?<=\d)\.(?=/)", "", row["answer"].replace("np.", "\\"))


def olympiad(row: Row, index: int) -> tuple[str, str]:
    """Several answers of one problem are given as one list."""
    return row["question"], ", ".join(answer.strip().strip("$") for answer in row["final_answer"])


def gpqa(row: Row, index: int) -> tuple[str, str]:
    """The right answer comes first in the file: the options are shuffled, in the same order for every model."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    order = random.Random(index).sample(range(4), 4)
    options = [row[names[number]].strip() for number in order]
    return with_options(row["Question"].strip(), options), ascii_uppercase[order.index(0)]


def mmlu_pro(row: Row, index: int) -> tuple[str, str]:
    return with_options(row["question"], row["options"]), row["answer"]


def arc(row: Row, index: int) -> tuple[str, str]:
    """Some questions have the labels 1 to 4, in the file and in the answer."""
    labels = row["choices"]["label"]
    return with_options(row["question"], row["choices"]["text"]), ascii_uppercase[labels.index(row["answerKey"])]


def with_options(question: str, options: list[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, "", *lines])


CHOICES: dict[str, Any] = {"reward_func": boxed_choice_reward, "instruction": CHOICE}
BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", None, "test", 500, **plain("problem", "answer")),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", None, "train", 30, **plain("problem", "answer"), protocol=AVG_32),
    "aime25": Benchmark("math-ai/aime25", None, "test", 30, **plain("problem", "answer"), protocol=AVG_32),
    "amc": Benchmark("AI-MO/aimo-validation-amc", None, "train", 83, **plain("problem", "answer"), protocol=AVG_32),
    "minerva": Benchmark("math-ai/minervamath", None, "test", 272, ("question", "answer"), minerva),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", 674, ("question", "final_answer"), olympiad
    ),
    "gpqa_diamond": Benchmark(
        "Idavidrein/gpqa",
        "gpqa_diamond",
        "train",
        198,
        ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        gpqa,
        **CHOICES,
    ),
    "mmlu_pro": Benchmark(
        "TIGER-Lab/MMLU-Pro", None, "test", 12032, ("question", "options", "answer"), mmlu_pro, **CHOICES
    ),
    "arc_challenge": Benchmark(
        "allenai/ai2_arc", "ARC-Challenge", "test", 1172, ("question", "choices", "answerKey"), arc, **CHOICES
    ),
}


def as_problem(benchmark: Benchmark, row: Row, index: int, instruction: str | None = None) -> dict[str, str]:
    """The columns `prompt` and `solution` of a row.

    Args:
        row: of the dataset on the Hub.
        index: its number there.
        instruction: the end of the prompt, if not the benchmark's own; empty for none.

    Raises:
        ValueError: naming a column that is not there.
    """
    missing = [name for name in benchmark.columns if name not in row]
    if missing:
        raise ValueError(
            f"{benchmark.dataset} has no column {missing[0]!r}, only {sorted(row)}: it has changed. Evaluate it with dataset_name, "
            "prompt_column and answer_column."
        )
    problem, solution = benchmark.convert(row, index)
    end = benchmark.instruction if instruction is None else instruction
    return {"prompt": f"{problem}\n\n{end}" if end else problem, "solution": solution}
