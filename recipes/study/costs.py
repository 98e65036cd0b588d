"""What guidance costs: tokens that models were run on, and seconds, by update.

Tokens are counted, and repeat exactly. Seconds are wall clock, of runs that shared a machine with others: they are compared with those of
another arm's run of the same seed, update by update, and of such ratios the median is taken, which a pause in either run does not move.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from arms import Arm, Estimate

SAMPLING = ("policy", "expert")  # whose tokens are counted while sampling ...
TOKENS = (*SAMPLING, "trained")  # ... and those in the loss


@dataclass(frozen=True)
class Cost:
    """What a table and a CSV file show of one cost of an arm.

    Attributes:
        scale, digits, unit: what it is multiplied by in a table, its digits behind the point there, and what follows them.
        significant: its digits in a CSV file.
    """

    estimate: Estimate
    scale: float = 1
    digits: int = 0
    unit: str = ""
    significant: int = 4


def periods(last_guided: int) -> dict[str, slice]:
    """The updates while most guided arms are guided, but the first, when models are run for the first time, and those after."""
    return {
        f"2 to {last_guided}": slice(1, last_guided),
        f"{last_guided + 1} on": slice(last_guided, None),
    }


def costs(arm: Arm, grpo: Arm | None, when: dict[str, slice]) -> dict[str, Cost]:
    """Measure -> its mean with an interval, in each of the periods; NaN where there is nothing to measure."""
    found = {}
    compared = grpo is not None and set(arm.runs) & set(grpo.runs)
    for period, updates in when.items():
        for name in SAMPLING:
            found[f"{name} tokens per update, {period}"] = Cost(arm.estimate(tokens(name, updates)))
        if compared:
            ratio = arm.paired(grpo, pace(updates))
            found[f"seconds per update (grpo 1), {period}"] = Cost(ratio, digits=1, significant=2)
    if compared:
        found["pass@1 after grpo's tokens"] = Cost(arm.paired(grpo, after_as_many), scale=100, digits=1, unit=" %")
    return found


def tokens(name: str, updates: slice) -> Callable[[dict], np.ndarray]:
    """Tokens per update, the mean over these updates."""

    def value(run: dict) -> np.ndarray:
        per_update = _by_update(run, name)[updates]
        return np.array([per_update.mean() if per_update.size else np.nan])

    return value


def pace(updates: slice) -> Callable[[dict, dict], np.ndarray]:
    """Seconds per update of one run as a multiple of another's: the median over these updates, those that both have."""

    def value(run: dict, other: dict) -> np.ndarray:
        pairs = zip(_seconds(run)[updates], _seconds(other)[updates], strict=False)  # one may be longer
        ratios = [ours / theirs for ours, theirs in pairs if np.isfinite(ours / theirs)]
        return np.array([np.median(ratios) if ratios else np.nan])

    return value


def after_as_many(run: dict, other: dict) -> np.ndarray:
    """pass@1 of the run's curve when it had sampled with as many tokens as the other in all; its last where it never did."""
    curve = [point["pass@1"] for point in run["curve"]]
    return np.array([np.interp(spent(other, SAMPLING)[-1], spent(run, SAMPLING), curve)])


def spent(run: dict, names: tuple[str, ...]) -> np.ndarray:
    """Tokens up to each point of the run's curve."""
    total = np.cumsum(sum(_by_update(run, name) for name in names))
    return np.concatenate([[0.0], total])[[point["step"] for point in run["curve"]]]


def _by_update(run: dict, name: str) -> np.ndarray:
    """Return the tokens of each update, which are recorded per rollout."""
    return run["training"]["per_device_train_batch_size"] * np.array(run["cost_by_update"][name])


def _seconds(run: dict) -> np.ndarray:
    """NaN where they were not measured: in supervised training."""
    return np.array(run["cost_by_update"].get("seconds", []), dtype=float)
