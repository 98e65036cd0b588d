"""Grading with a limit: what takes too long ends, is reported, and costs nobody else anything."""

import os
import signal
import subprocess
import sys
import time

import pytest

from trl_selective.grading_pool import GradingPool, Verdict
from trl_selective.rewards import boxed_accuracy_reward

RIGHT, WRONG = Verdict(1.0, False), Verdict(0.0, False)
LATE = Verdict(None, True)

REWARDS = """
import ctypes, os, time
def by_word(completions, solution, **columns):
    text = completions[0]
    if text == "sleep":
        time.sleep(600)
    if text == "power":
        9**9**9  # one step of the interpreter, in which it hears of no signal
    if text == "crash":
        ctypes.string_at(0)
    if text == "raise":
        raise KeyError("a bug")
    if text == "two":
        return [1.0, 1.0]
    if text == "large":
        return [1e39]
    if text == "print":
        print("this must not get between the answers")
        os.write(1, b"nor this")
    return [None if text == "skip" else float(text == solution[0])]
"""


@pytest.fixture
def by_word(tmp_path, monkeypatch):
    (tmp_path / "rewards_by_word.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("rewards_by_word", None)
    from rewards_by_word import by_word

    return by_word


def calls(*completions):
    return [{"prompts": ["?"], "completions": [text], "solution": ["4"]} for text in completions]


def test_an_answer_that_math_verify_cannot_finish():
    """SymPy computes 9^(9^(9^9)) for longer than anyone waits; the answers around it are graded as if it were not there."""
    answers = [r"\boxed{4}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{5}", r"\boxed{2^2}"]
    with GradingPool(boxed_accuracy_reward, timeout=2, num_workers=1) as pool:
        assert pool.grade(calls(*answers)) == [RIGHT, LATE, WRONG, RIGHT]


def test_late_and_crashed_answers_are_told_from_wrong_ones(by_word):
    with GradingPool(by_word, timeout=1, num_workers=2) as pool:
        verdicts = pool.grade(calls("4", "sleep", "power", "crash", "print", "skip", "5", "4"))
        assert verdicts == [RIGHT, LATE, LATE, LATE, WRONG, Verdict(None, False), WRONG, RIGHT]
        assert pool.grade(calls("4", "5")) == [RIGHT, WRONG]


def test_the_limit_is_for_one_answer_not_for_all(by_word):
    with GradingPool(by_word, timeout=1, num_workers=4) as pool:
        start = time.monotonic()
        assert pool.grade(calls(*["sleep"] * 4, *["4"] * 200)) == [LATE] * 4 + [RIGHT] * 200
        assert time.monotonic() - start < 30


def test_no_process_outlives_its_caller(by_word, tmp_path):
    """Killed in the middle of an answer: the timer ends the process all the same."""
    script = (
        "import sys; from trl_selective.grading_pool import GradingPool; from rewards_by_word import by_word\n"
        "pool = GradingPool(by_word, 2, 1); pool.grade([{'completions': ['4'], 'solution': ['4']}])\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        "pool.grade([{'completions': ['power'], 'solution': ['4']}])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as caller:
        pid = int(caller.stdout.readline())
        caller.kill()
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline, "the process goes on without its caller"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that nobody collects."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_bug_of_the_function_reaches_the_user(by_word):
    with (
        GradingPool(by_word, timeout=5, num_workers=1) as pool,
        pytest.raises(RuntimeError, match=r"(?s)rewards_by_word.by_word failed:.*KeyError: 'a bug'"),
    ):
        pool.grade(calls("4", "raise"))


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [("two", "returned 2 rewards for 1 completions"), ("large", "returned 1e[+]39 for completion 0")],
)
def test_what_a_function_returns_is_checked_as_without_a_limit(by_word, answer, refusal):
    with GradingPool(by_word, timeout=5, num_workers=1) as pool, pytest.raises(RuntimeError, match=refusal):
        pool.grade(calls(answer))


def test_a_module_that_other_processes_cannot_import(tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text(
        "import os\nassert not os.environ.get('NOT_THERE'), 'not there'\n\ndef reward(completions):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_here import reward

    monkeypatch.setenv("NOT_THERE", "1")
    with (
        GradingPool(reward, timeout=5, num_workers=1) as pool,
        pytest.raises(RuntimeError, match=r"(?s)only_here.reward failed:.*AssertionError: not there"),
    ):
        pool.grade([{"completions": ["4"]}])


def test_a_system_without_timers_is_named(monkeypatch, by_word):
    """Otherwise every answer would pass for a late one."""
    monkeypatch.delattr(signal, "setitimer")
    with pytest.raises(ValueError, match=r"no timers that end a process.*Grade without one \(grading_timeout=0\)"):
        GradingPool(by_word, timeout=1)


def test_a_function_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"needs a reward function that other processes can import, got .*<lambda>"):
        GradingPool(lambda completions: [1.0], timeout=1)
