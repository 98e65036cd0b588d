"""Grading that no answer can stop: each is graded in a process of its own pool, which the kernel ends when it takes too long.

Math-Verify hands answers to SymPy, which can think about `9^{9^{9^9}}` for hours. Its own timeouts are signals that Python handles between two
steps of its interpreter: they never come while a single step takes for ever, and when they come, the answer passes for a wrong one without a
word. Here a timer with the signal's default action ends the process, whatever it does, and the verdict says so.

This file is also the program of those processes (`python -m trl_selective.grading_pool MODULE FUNCTION SECONDS`), so it imports nothing large.
They get the columns of a row as a pickle, as `multiprocessing` would send them. What comes back is JSON: nothing that has read a model's text is
unpickled.
"""

import importlib
import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from trl_selective.reward_calls import call_reward, check_rewards


class Verdict(NamedTuple):
    """The reward of one completion, None where the function does not apply; or that it came to none, in time or at all."""

    reward: float | None
    timed_out: bool


class GradingPool:
    """Calls a reward function for one completion at a time, in processes that end when one takes too long.

    Args:
        reward_func: a function at the top of a module, which the processes import.
        timeout: seconds for one completion, > 0.
        num_workers: processes; one for each core by default, at most 8.

    Raises:
        ValueError: if the function cannot be imported by its name, or if this system has no timers that end a process (Windows).

    Example:
        >>> with GradingPool(boxed_accuracy_reward, timeout=10) as pool:
        ...     pool.grade([{"completions": [r"\\boxed{4}"], "solution": ["4"]}])
        [Verdict(reward=1.0, timed_out=False)]
    """

    def __init__(self, reward_func: Callable, timeout: float, num_workers: int | None = None):
        module, name = reward_func.__module__, getattr(reward_func, "__qualname__", "?")
        if module == "__main__" or getattr(sys.modules.get(module), name, None) is not reward_func:
            raise ValueError(
                f"A time limit needs a reward function that other processes can import, got {module}.{name}. Put it at the top of a module of "
                "its own, or grade without a limit."
            )
        if not hasattr(signal, "setitimer"):
            raise ValueError(
                f"This system ({sys.platform}) has no timers that end a process, which a time limit for grading needs. Grade without one "
                "(grading_timeout=0)."
            )
        num_workers = num_workers or min(8, os.cpu_count() or 1)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(module, name, timeout) for _ in range(num_workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers)

    def grade(self, calls: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """A verdict for each call of the function, which is given by its keyword arguments: columns of one row.

        Raises:
            RuntimeError: if the function raises, with its traceback.
        """
        return list(self._threads.map(self._grade, calls))

    def _grade(self, arguments: Mapping[str, Any]) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.call(arguments)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> "GradingPool":
        return self

    def __exit__(self, *exception) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()


class _Worker:
    """One process, started when it is needed and anew after it ended."""

    def __init__(self, module: str, name: str, timeout: float):
        self.command = [sys.executable, "-m", "trl_selective.grading_pool", module, name, str(timeout)]
        self.name = f"{module}.{name}"
        self.process: subprocess.Popen | None = None

    def call(self, arguments: Mapping[str, Any]) -> Verdict:
        process = self.process or self._start()
        assert process.stdin, "opened as a pipe"
        try:
            pickle.dump(dict(arguments), process.stdin)
            process.stdin.flush()
            return Verdict(self._receive(process), timed_out=False)
        except (EOFError, BrokenPipeError, json.JSONDecodeError):  # it was ended, or crashed, maybe within its answer
            self.stop()
            return Verdict(None, timed_out=True)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _start(self) -> subprocess.Popen:
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # an interrupt from the keyboard is for the caller, who ends this process
        )
        try:
            self._receive(self.process)  # once the function is imported, which does not count
        except EOFError as error:
            self.stop()
            raise RuntimeError(f"The process that grades with {self.name} ended while it started.") from error
        except RuntimeError:
            self.stop()
            raise
        return self.process

    def _receive(self, process: subprocess.Popen) -> float | None:
        assert process.stdout, "opened as a pipe"
        line = process.stdout.readline()
        if not line:
            raise EOFError
        reward, failure = json.loads(line)
        if failure:
            raise RuntimeError(f"The reward function {self.name} failed:\n{failure}")
        return reward


def _serve(module: str, name: str, timeout: float, answers) -> None:
    """Import the function and say so, then answer each call on the standard input, until there are no more."""

    def answer(reward: float | None, failure: str | None) -> None:
        answers.write(json.dumps([reward, failure]).encode() + b"\n")
        answers.flush()

    try:
        function = getattr(importlib.import_module(module), name)
    except Exception:  # noqa: BLE001 - all of it goes to the caller, who raises
        answer(None, traceback.format_exc())
        return
    answer(None, None)
    while True:
        try:
            arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout)
        reward, failure = _try(function, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer(reward, failure)


def _try(function: Callable, arguments: Mapping[str, Any]) -> tuple[float | None, str | None]:
    """The reward, or why there is none."""
    try:
        rewards = call_reward(function, arguments)
        (reward,) = check_rewards(rewards, arguments["completions"], function.__name__)
        return reward, None
    except Exception:  # noqa: BLE001 - all of it goes to the caller, who raises
        return None, traceback.format_exc()


def _main(module: str, name: str, timeout: str) -> None:
    """Serve outside the main thread, where Math-Verify sets no timer of its own, which would replace ours."""
    logging.disable(logging.WARNING)  # Math-Verify's, at every call, that it has no timer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not get between the answers
    thread = threading.Thread(target=_serve, args=(module, name, float(timeout), answers), daemon=True)
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main(*sys.argv[1:])
