"""The data of the recipes, made from small files with the columns of the originals."""

import json
import sys

import pytest
from datasets import load_dataset
from transformers import AutoTokenizer

from tests.training import POLICY, QUICKSTART

sys.path.insert(0, str(QUICKSTART.parent))
from prepare_data import DataArguments, main, normalised, write

from trl_selective.experts import CompletionReader
from trl_selective.rewards import boxed_accuracy_reward


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def problem(text, level="Level 3", solution=r"So it is \boxed{\frac{1}{2}}."):
    return {"problem": text, "level": level, "type": "Algebra", "solution": solution}


@pytest.fixture
def heldout(tmp_path):
    return save(tmp_path / "heldout.jsonl", [{"problem": r"What is $\dfrac{1}{2}+1\,?$", "answer": "1.5"}])


@pytest.fixture
def math(tmp_path):
    folder = tmp_path / "math"
    folder.mkdir()
    save(folder / "train.jsonl", [problem("a", "Level 2"), problem("b"), problem("c", "Level 5"), problem("what is $\\frac{1}{2} + 1?$")])  # fmt: skip
    save(folder / "test.jsonl", [problem(" B "), problem("d", "Level 4"), problem("e", solution="none"), problem("f", "Level ?")])  # fmt: skip
    return str(folder)


def test_math_keeps_levels_3_to_5_without_what_is_held_out(tmp_path, math, heldout):
    out = tmp_path / "data" / "out.jsonl"
    summary = main(DataArguments("math", str(out), dataset_name=math, heldout_name=heldout))
    rows = load(out)
    assert [row["problem"] for row in rows] == ["b", "c", "d"]  # of both splits
    assert rows[0]["solution"] == r"\boxed{\frac{1}{2}}"
    assert boxed_accuracy_reward([r"\boxed{0.5}", r"\boxed{2}"], [rows[0]["solution"]] * 2) == [1, 0]
    assert summary.startswith(f"3 rows are in {out}, of 3 problems.")
    for left_out in ("2 of another level", "1 held out", "1 repeated", "1 without a boxed answer"):
        assert left_out in summary


def test_problems_that_differ_in_spacing_are_the_same():
    assert normalised(r"What is $\dfrac{1}{2}\!+1$ ?") == normalised("what is \\frac{1}{2} + 1?")
    assert normalised("1 + 2") != normalised("1 + 3")


OPENR1 = [
    {  # the second is shorter, the third wrong, the fourth cut off, the fifth too long
        "problem": "p", "answer": "2", "generations": ["1 2 3", "1 2", "3", "4", "5 " * 9],
        "is_reasoning_complete": [True, True, True, False, True], "correctness_math_verify": [True, True, False, True, True],
        "correctness_llama": None,
    },
    {  # a judge's verdict
        "problem": "q", "answer": "3", "generations": ["6"], "is_reasoning_complete": [True],
        "correctness_math_verify": [False], "correctness_llama": [True],
    },
    {
        "problem": "r", "answer": "4", "generations": ["7"], "is_reasoning_complete": [True],
        "correctness_math_verify": [False], "correctness_llama": None,
    },
    {
        "problem": "s", "answer": "5", "generations": ["8 " * 9], "is_reasoning_complete": [True],
        "correctness_math_verify": [True], "correctness_llama": None,
    },
]  # fmt: skip


def openr1(tmp_path, heldout, task="openr1", **changes):
    out = tmp_path / "out.jsonl"
    data = save(tmp_path / "openr1.jsonl", OPENR1)
    settings = {"heldout_name": heldout, "tokenizer_name_or_path": POLICY, "max_response_tokens": 9} | changes
    return main(DataArguments(task, str(out), dataset_name=data, **settings)), load(out), out


def test_openr1_keeps_short_verified_responses(tmp_path, heldout):
    summary, rows, out = openr1(tmp_path, heldout)
    assert rows == [
        {"problem": "p", "solution": "2", "expert_completions": ["1 2", "1 2 3"]},
        {"problem": "q", "solution": "3", "expert_completions": ["6"]},
    ]
    assert "1 without a verified response" in summary
    assert "1 without a short response" in summary
    # The trainer can read them.
    reader = CompletionReader(AutoTokenizer.from_pretrained(POLICY), [1], 26, "expert_completions", None, None, "drop", False, str)  # fmt: skip
    reader.check(load_dataset("json", data_files=str(out), split="train").rename_column("problem", "prompt"))


def test_no_more_completions_than_wanted(tmp_path, heldout):
    _, rows, _ = openr1(tmp_path, heldout, max_completions=1)
    assert [row["expert_completions"] for row in rows] == [["1 2"], ["6"]]


def test_rows_to_train_an_expert_on(tmp_path, heldout):
    _, rows, _ = openr1(tmp_path, heldout, task="sft", system_prompt="Think.")
    assert len(rows) == 3
    assert rows[0] == {
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "p"}],
        "completion": [{"role": "assistant", "content": "1 2"}],
    }


def test_all_rows_or_no_file(tmp_path):
    def broken():
        yield {"a": 1}
        raise RuntimeError("interrupted")

    path = tmp_path / "out.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write(broken(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]
    assert path.read_text() == "old"
    with pytest.raises(ValueError, match=r"No row is left for .*: it was not written"):
        write([], path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "absent.jsonl"}, "The split 'train' of 'absent.jsonl' could not be read"),
        ({"heldout_name": "absent.jsonl"}, "The split 'test' of 'absent.jsonl' could not be read"),
        ({"task": "openr1"}, "tokenizer_name_or_path is not set"),
        ({"dataset_name": "HELDOUT"}, "has no column 'solution', only \\['answer', 'problem'\\]"),
    ],
)
def test_what_is_missing_is_named(tmp_path, math, heldout, changes, message):
    settings = {"task": "math", "dataset_name": math, "heldout_name": heldout} | changes
    settings = {name: heldout if value == "HELDOUT" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        main(DataArguments(output_file=str(tmp_path / "out.jsonl"), **settings))
    assert not (tmp_path / "out.jsonl").exists()
