"""From the results of runs to numbers with intervals.

A number is a mean over seeds and held-out problems. Its 95 % interval is a bootstrap over both: seeds are drawn anew, and problems, so that it
says what other seeds and other problems of the kind could have given. Differences between two arms are paired: the same seeds and problems of
both. With five seeds such intervals are too narrow rather than too wide: read those that just miss 0 as open.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from trl_selective.evaluation import Estimate, bootstrap
from trl_selective.functional.diversity import pass_at_k

KS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Arm:
    """The runs of one arm in one comparison, by seed; or a model as it is, measured as if it were one run."""

    name: str
    runs: dict[int, dict]
    is_model: bool = False

    def estimate(self, value: Callable[[dict], np.ndarray]) -> Estimate:
        """The mean of what `value` finds in each problem."""
        return bootstrap(np.stack([value(run) for run in self.runs.values()]))

    def minus(self, other: "Arm", value: Callable[[dict], np.ndarray]) -> Estimate:
        """The paired difference, over the seeds that both have."""
        return self.paired(other, lambda ours, theirs: value(ours) - value(theirs))

    def paired(self, other: "Arm", value: Callable[[dict, dict], np.ndarray]) -> Estimate:
        """What `value` finds in two runs of one seed, over the seeds that both have."""
        return bootstrap(
            np.stack([value(run, other.runs[seed]) for seed, run in self.runs.items() if seed in other.runs])
        )


def success(k: int, level: str | None = None) -> Callable[[dict], np.ndarray]:
    """pass@k of each problem; NaN for those of another level."""

    def value(run: dict) -> np.ndarray:
        final = run["final"]
        rates = pass_at_k(final["num_samples"], torch.tensor(final["num_correct"]), k).double().numpy()
        return rates if level is None else np.where([each == level for each in run["levels"]], rates, np.nan)

    return value


def distinct(run: dict) -> np.ndarray:
    """Different right answers to each problem."""
    return np.array(run["final"]["distinct_correct"], dtype=float)


def whole(name: str, part: str = "final") -> Callable[[dict], np.ndarray]:
    """A number of the whole run."""

    def value(run: dict) -> np.ndarray:
        number = run[part][name]
        return np.array([np.nan if number is None else float(number)])

    return value


@cache
def comparisons(results: Path) -> dict[str, dict[str, Arm]]:
    """Comparison -> arm -> its runs, of all that are in the folder."""
    found: dict[str, dict[str, dict[int, dict]]] = {}
    for path in sorted(results.glob("runs/*/*.json")):
        run = json.loads(path.read_text())
        found.setdefault(path.parent.name, {}).setdefault(run["arm"], {})[run["seed"]] = run
    return {place: {name: Arm(name, runs) for name, runs in arms.items()} for place, arms in found.items()}


def curve(arm: Arm, name: str) -> tuple[list[int], list[Estimate]]:
    """A measure over the updates, with its interval over seeds."""
    steps = [point["step"] for point in next(iter(arm.runs.values()))["curve"]]
    values = np.array([[point[name] for point in run["curve"]] for run in arm.runs.values()], dtype=float)
    return steps, [bootstrap(column[:, None]) for column in values.T]
