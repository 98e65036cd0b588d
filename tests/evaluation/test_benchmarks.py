"""Each benchmark's rows, in the form that they have on the Hub, become prompts and solutions that their reward can grade."""

import re

import pytest

from trl_selective.evaluation import BENCHMARKS, as_problem
from trl_selective.evaluation.benchmarks import CHOICE, MATH
from trl_selective.rewards import boxed_accuracy_reward

# Columns and types of the uploads; contents are ours.
ROWS = {
    "math500": {"problem": "1 + 1?", "solution": r"So $\boxed{2}$.", "answer": r"\frac{4}{2}", "subject": "Algebra", "level": 2, "unique_id": "test/a/1.json"},
    "aime24": {"id": 60, "problem": "7 * 7?", "solution": "...", "answer": "049", "url": "https://example.org", "year": "2024"},
    "aime25": {"problem": "7 * 7?", "answer": "49", "id": "0"},
    "amc": {"id": 0, "problem": "9 * 3?", "answer": 27.0, "url": "https://example.org"},
    "minerva": {"question": "A star's mass in grams?", "answer": "2e33"},
    "olympiadbench": {"id": 1606, "question": "All roots of $x^2 = 4$?", "solution": ["..."], "final_answer": ["$2$", "-2"], "context": None, "is_multiple_answer": True, "unit": None, "answer_type": "Numerical", "error": None},
    "gpqa_diamond": {"Record ID": "rec", "Question": "Which is right? ", "Correct Answer": "this\n", "Incorrect Answer 1": "no", "Incorrect Answer 2": "nor this", "Incorrect Answer 3": "nor that", "Subdomain": "Physics"},
    "mmlu_pro": {"question_id": 70, "question": "The tenth?", "options": [f"option {i}" for i in range(10)], "answer": "J", "answer_index": 9, "cot_content": "", "category": "business", "src": "x"},
    "arc_challenge": {"id": "M", "question": "Which?", "choices": {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}, "answerKey": "3"},
}  # fmt: skip
RIGHT = {
    "math500": "2", "aime24": "49", "aime25": "49", "amc": "27", "minerva": r"2 \times 10^{33}", "olympiadbench": "-2, 2", "mmlu_pro": r"\text{J}", "arc_challenge": "C. y",
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_right_answer_is_right_and_a_wrong_one_wrong(name):
    benchmark = BENCHMARKS[name]
    problem = as_problem(benchmark, ROWS[name], 0)
    is_math = benchmark.reward_func is boxed_accuracy_reward
    assert problem["prompt"].endswith("\n\n" + (MATH if is_math else CHOICE))
    right = RIGHT.get(name, problem["solution"])
    wrong = "5" if is_math else "AB"
    answers = [rf"So \boxed{{{right}}}.", rf"So \boxed{{{wrong}}}."]
    assert benchmark.reward_func(answers, solution=[problem["solution"]] * 2) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("7.25e-5", r"7.25 \times 10^{-5}"), ("-4.5e+33", r"-4.5\cdot 10^{33}"), ("1e3", "1000"), ("x e", "xe"), (r"\frac{1}{2}", "0.5")],
)  # fmt: skip
def test_scientific_notation_of_minerva(answer, right):
    problem = as_problem(BENCHMARKS["minerva"], {"question": "?", "answer": answer}, 0)
    assert boxed_accuracy_reward([rf"\boxed{{{right}}}"], [problem["solution"]]) == [1.0]


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("minerva", "np.arcsin(10/13)", r"\arcsin(10/13)"),
        ("minerva", "-1./3", r"-\frac13"),
        ("minerva", "-3./2", "-1.5"),
        ("olympiadbench", [r"$(-\infty, 0) \cup\{1\}$."], r"(-\infty,0)\cup\{1\}"),
        ("olympiadbench", ["$2$", "-2"], "-2, 2"),
        ("olympiadbench", ["$x+1$,$x-1$."], "x-1, x+1"),
    ],
)
def test_answers_of_the_files_that_are_written_otherwise(name, answer, right):
    column = BENCHMARKS[name].columns[1]
    problem = as_problem(BENCHMARKS[name], {"question": "?", column: answer}, 0)
    assert boxed_accuracy_reward([rf"\boxed{{{right}}}", r"\boxed{17}"], [problem["solution"]] * 2) == [1.0, 0.0]


def test_the_options_of_gpqa_are_shuffled_alike_every_time():
    """Over many rows the right option has all letters, and it is always the one that the solution names."""
    benchmark, row = BENCHMARKS["gpqa_diamond"], ROWS["gpqa_diamond"]
    problems = [as_problem(benchmark, row, index) for index in range(100)]
    assert problems == [as_problem(benchmark, row, index) for index in range(100)]
    letters = [re.search(r"^([A-D])\. this$", problem["prompt"], re.MULTILINE)[1] for problem in problems]
    assert letters == [problem["solution"] for problem in problems]
    assert {letter: 15 < letters.count(letter) < 35 for letter in "ABCD"} == dict.fromkeys("ABCD", True)


def test_what_a_prompt_looks_like():
    assert as_problem(BENCHMARKS["arc_challenge"], ROWS["arc_challenge"], 0, "Letter!") == {
        "prompt": "Which?\n\nA. w\nB. x\nC. y\nD. z\n\nLetter!",
        "solution": "C",
    }
    assert as_problem(BENCHMARKS["amc"], ROWS["amc"], 0, "") == {"prompt": "9 * 3?", "solution": "27"}


def test_the_papers_protocol():
    """METHOD of the paper: AIME and AMC 32 times at 0.6, the others greedily."""
    often = {"aime24", "aime25", "amc"}
    for name, benchmark in BENCHMARKS.items():
        expected = (32, 0.6) if name in often else (1, 0.0)
        assert (benchmark.protocol.num_samples, benchmark.protocol.temperature) == expected


def test_a_column_that_is_gone():
    with pytest.raises(ValueError, match=r"math-ai/aime25 has no column 'answer', only \['problem'\]: it has changed"):
        as_problem(BENCHMARKS["aime25"], {"problem": "?"}, 0)
