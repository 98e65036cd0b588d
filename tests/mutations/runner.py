"""Runs the tests on a copy of the project with a fault in it. The project itself is never touched."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.mutations.mutation import ROOT, Mutation

CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"
TIMEOUT = 200  # seconds for one test: a fault may make it run forever
PRELOADED = ["beartype", "datasets", "hypothesis", "peft", "pytest", "scipy.stats", "trl.trainer.grpo_trainer"]


@dataclass(frozen=True)
class Verdict:
    """What the tests say to a mutation: `CAUGHT`, `SURVIVED`, or `BROKEN` where they could not run. `by` is the test, or the reason."""

    mutation: Mutation
    outcome: str
    by: str
    seconds: float


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A temporary copy of the project without what .gitignore names."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line[:1] not in ("", "#")]
    names = shutil.ignore_patterns(".git", *(pattern.split("/")[-1] for pattern in ignored))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=names)
        yield tree


def run_tests(tree: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Run these tests of a tree up to the first that fails: pytest's exit code and what it writes. In a process that is forked from one that has
    loaded the libraries, which takes longer than most tests."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # as tests/conftest.py, before anything is loaded
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    output = tree.parent / "output.txt"
    process = context.Process(target=_pytest, args=(tree, list(tests), output))
    process.start()
    process.join()
    return process.exitcode, output.read_text() if output.exists() else ""


def _pytest(tree: Path, tests: list[str], output: Path) -> None:
    """What the process does: with the modules of the tree, and none of this project."""
    import pytest

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(tree)
    os.chdir(tree)
    options = ["-x", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider", f"--timeout={TIMEOUT}"]
    sys.exit(int(pytest.main([*options, *tests])))


def check_unchanged(mutations: Iterable[Mutation]) -> None:
    """Run all tests that are going to judge on the project as it is.

    Raises:
        RuntimeError: if one fails, which would seem to find every fault.
    """
    with copied_tree() as tree:
        code, output = run_tests(tree, sorted({name for mutation in mutations for name in mutation.tests_below(tree)}))
    if code != 0:
        raise RuntimeError(f"The tests fail without any mutation, and so can judge none:\n{output[-3000:]}")


def judge(mutation: Mutation) -> Verdict:
    """Apply a mutation to a copy and run its tests there."""
    started = time.perf_counter()
    with copied_tree() as tree:
        mutation.apply(tree)
        code, output = run_tests(tree, mutation.tests_below(tree))
    # pytest ends with 0 if all tests pass and with 1 if one fails; all else means that it could not run them.
    outcome = {0: SURVIVED, 1: CAUGHT}.get(code, BROKEN)
    failed = [
        line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED")
    ]
    by = {SURVIVED: "", CAUGHT: failed[0] if failed else "an error"}.get(outcome, output[-300:])
    return Verdict(mutation, outcome, by, time.perf_counter() - started)


def judge_all(mutations: Iterable[Mutation], jobs: int) -> Iterator[Verdict]:
    """Judge mutations, `jobs` at a time, in their order."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(judge, mutations)
