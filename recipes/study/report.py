"""Tables and pictures of all runs that are there."""

import csv
import json
from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import Any

from arms import Arm, Estimate, comparisons, distinct, success, whole
from costs import Cost, costs, periods
from pictures import plot_costs, plot_curves, plot_habits, plot_pass_at_k

from trl_selective.reporting.markdown import table

SHOWN = ("grpo", "sft", "luffy", "mentor", "hard_gate", "random_positions", "selected")  # in pictures
MEASURES = {
    "pass@1": success(1),
    "pass@8": success(8),
    "pass@64": success(64),
    "near pass@1": success(1, "near"),
    "far pass@1": success(1, "far"),
    "far pass@64": success(64, "far"),
    "greedy": whole("greedy"),
    "distinct correct of 64": distinct,
    "entropy": whole("entropy"),
    "length": whole("length"),
    "filler": whole("filler"),
    "shortest": whole("shortest"),
    "policy tokens": whole("policy", "cost"),
    "expert tokens": whole("expert", "cost"),
    "trained tokens": whole("trained", "cost"),
    "seconds": whole("seconds", "cost"),
}
COSTS = ("policy tokens", "expert tokens", "trained tokens", "seconds")
COST_CAPTION = (
    "What an update cost, in means over the seeds with 95 % intervals. Tokens are those that models were run on while sampling. Seconds are the "
    "median of their ratios to those of GRPO's update of the same number and seed, by wall clock: where runs shared a machine, only what all "
    "seeds agree in says something. pass@1 is that of the curves, when an arm had sampled with as many tokens of policy and expert as GRPO in "
    "all; an arm that never did is shown at its end."
)
COMPARED = ("pass@1", "pass@64", "distinct correct of 64")  # whose differences to GRPO are given


def report(results: Path, settings: dict[str, Any]) -> str:
    """Write tables and pictures of each comparison to the folder. Returns the tables.

    Args:
        results: folder with the runs.
        settings: those that the runs were made with.
    """
    places = comparisons(results)
    if unknown := set(places) - set(settings["comparisons"]):
        raise SystemExit(
            f"{results} has runs of {', '.join(sorted(unknown))}, which the settings do not know: they have {list(settings['comparisons'])}. "
            "Give the --settings that these runs were made with."
        )
    order = [arm for group in settings["arms"].values() for arm in group]
    when = periods(settings["arms"]["main"]["mentor"]["guidance_steps"])
    texts = []
    for place, found in places.items():
        arms = {name: found[name] for name in sorted(found, key=order.index)}
        where = settings["comparisons"][place]
        starts = {"start": where["base"], "expert": "expert"}
        folder = results / "models" / where["task"]
        models = {name: _model(name, folder / f"{model}.json") for name, model in starts.items()}
        spent = {name: costs(arm, arms.get("grpo"), when) for name, arm in arms.items()}
        write_csv({**models, **arms}, spent, results / f"{place}.csv")
        parts = [
            f"### {place}",
            _caption(arms),
            main_table(arms, models),
            contrast_table(arms, settings["contrasts"]),
            COST_CAPTION,
            cost_table(spent),
        ]
        texts.append("\n\n".join(part for part in parts if part) + "\n")
        (results / f"{place}.md").write_text(texts[-1])
        shown = {name: arm for name, arm in arms.items() if name in SHOWN} or arms
        plot_curves(shown, results / f"{place}-curves.png")
        plot_costs(shown, results / f"{place}-costs.png")
        plot_pass_at_k({**models, **shown}, results / f"{place}-pass_at_k.png")
        plot_habits({**models, **shown}, results / f"{place}-habits.png")
    return "\n".join(texts)


def _model(name: str, path: Path) -> Arm:
    """A model as it is, measured as the arms are."""
    return Arm(name, {0: json.loads(path.read_text())}, is_model=True)


def _caption(arms: dict[str, Arm]) -> str:
    seeds = sorted({len(arm.runs) for arm in arms.values()})
    final = next(iter(next(iter(arms.values())).runs.values()))["final"]
    return (
        f"{' to '.join(map(str, seeds))} seed{'s' * (seeds != [1])} per arm, {len(final['num_correct'])} held-out problems, {final['num_samples']} answers to each; means "
        "with 95 % intervals over seeds and problems."
    )


def main_table(arms: dict[str, Arm], models: dict[str, Arm]) -> str:
    """One line per arm: means with 95 % intervals, and the paired difference to GRPO."""
    columns: dict[str, Callable[[Arm], str]] = {
        "": lambda arm: arm.name,
        "pass@1, %": lambda arm: arm.estimate(success(1)).text(100),
        "minus grpo": lambda arm: _minus(arm, arms.get("grpo"), success(1)),
        "pass@64, %": lambda arm: arm.estimate(success(64)).text(100),
        "distinct of 64": lambda arm: arm.estimate(distinct).text(),
        "entropy": lambda arm: f"{arm.estimate(whole('entropy')).mean:.2f}",
        "length": lambda arm: f"{arm.estimate(whole('length')).mean:.1f}",
        "filler, %": lambda arm: f"{100 * arm.estimate(whole('filler')).mean:.0f}",
    }
    of_runs: dict[str, Callable[[Arm], str]] = {
        "expert tokens, k": lambda arm: f"{arm.estimate(whole('expert', 'cost')).mean / 1000:.0f}",
        "seconds": lambda arm: f"{arm.estimate(whole('seconds', 'cost')).mean:.0f}",
        "lr": lambda arm: f"{next(iter(arm.runs.values()))['learning_rate']:g}",
    }
    rows = [[show(arm) for show in columns.values()] + [""] * len(of_runs) for arm in models.values()]
    rows += [[show(arm) for show in (columns | of_runs).values()] for arm in arms.values()]
    return table([*columns, *of_runs], rows)


def contrast_table(arms: dict[str, Arm], contrasts: list[dict[str, str]]) -> str:
    """The questions of the study, each as a paired difference between two arms; those whose arms both ran."""
    rows = [
        [
            each["question"],
            f"{each['arm']} - {each['minus']}",
            _minus(arms[each["arm"]], arms[each["minus"]], success(1)),
            _minus(arms[each["arm"]], arms[each["minus"]], success(64)),
            arms[each["arm"]].minus(arms[each["minus"]], distinct).text(sign="+"),
        ]
        for each in contrasts
        if each["arm"] in arms and each["minus"] in arms
    ]
    return (
        table(["question", "difference", "pass@1, points", "pass@64, points", "distinct of 64"], rows) if rows else ""
    )


def cost_table(spent: dict[str, dict[str, Cost]]) -> str:
    """One line per arm: means with 95 % intervals; nothing where nothing was measured."""
    measures = list(dict.fromkeys(measure for found in spent.values() for measure in found))
    rows = [[name, *(_cost(found.get(measure)) for measure in measures)] for name, found in spent.items()]
    return table(["", *measures], rows)


def _cost(cost: Cost | None) -> str:
    if cost is None or isnan(cost.estimate.mean):
        return ""
    if cost.estimate.low == cost.estimate.high:
        return f"{cost.scale * cost.estimate.mean:.{cost.digits}f}{cost.unit}"
    return cost.estimate.text(cost.scale, cost.digits) + cost.unit


def _minus(arm: Arm, other: Arm | None, value: Callable) -> str:
    """Give the difference in points of percent; nothing where there is nothing to compare."""
    if other is None or other is arm or arm.is_model or not set(arm.runs) & set(other.runs):
        return ""
    return arm.minus(other, value).text(100, sign="+")


def write_csv(arms: dict[str, Arm], spent: dict[str, dict[str, Cost]], path: Path) -> None:
    """
    All measures of all arms: mean, interval, and where it is one of `COMPARED`, the difference to GRPO with its interval. Then what their
    updates cost.
    """
    grpo = arms.get("grpo")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["arm", "seeds", "measure", "mean", "low", "high", "minus_grpo", "minus_grpo_low", "minus_grpo_high"]
        )
        for name, arm in arms.items():
            for measure, value in MEASURES.items():
                if measure in COSTS and arm.is_model:
                    continue
                shown = arm.estimate(value)
                row = [name, len(arm.runs), measure, *_numbers(shown)]
                if grpo and measure in COMPARED and not arm.is_model:
                    row += _numbers(arm.minus(grpo, value))
                writer.writerow(row)
            for measure, cost in spent.get(name, {}).items():
                if not isnan(cost.estimate.mean):
                    numbers = _numbers(cost.estimate, cost.significant)
                    writer.writerow([name, len(arm.runs), measure, *numbers])


def _numbers(estimate: Estimate, digits: int = 5) -> list[str]:
    return [f"{value:.{digits}g}" for value in (estimate.mean, estimate.low, estimate.high)]
