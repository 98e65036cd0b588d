"""Times that can be compared on a machine that others use too."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every run, `repeats` times in turn. All runs of one turn have one seed, and the order is reversed from turn to turn, so that
    nothing profits from its luck or place. They should have run once before. Each one is told of at once: what is cut off is not lost."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            torch.manual_seed(repeat)
            synchronize()
            start = time.perf_counter()
            runs[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return seconds


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of ratios within a round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def peak_megabytes(run: Callable[[], Any]) -> float:
    """Memory that a run takes at its peak, over what was taken before: of the accelerator, else of the process (on Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _kilobytes(status, "VmHWM")
    run()
    return (_kilobytes(status, "VmHWM") - before) / 2**10


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
