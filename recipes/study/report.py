"""Tables and pictures of all runs that are there."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from intervals import KS, Arm, Estimate, comparisons, curve, distinct, success, whole
from matplotlib.figure import Figure

HERE = Path(__file__).parent
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
COMPARED = ("pass@1", "pass@64", "distinct correct of 64")  # whose differences to GRPO are given


def report(results: Path) -> str:
    """Write tables and pictures of each comparison to the folder. Returns the tables."""
    settings = yaml.safe_load((HERE / "study.yaml").read_text())
    order = [arm for group in settings["arms"].values() for arm in group]
    texts = []
    for place, found in comparisons(results).items():
        arms = {name: found[name] for name in sorted(found, key=order.index)}
        where = settings["comparisons"][place]
        starts = {"start": where["base"], "expert": "expert"}
        folder = results / "models" / where["task"]
        models = {name: _model(name, folder / f"{model}.json") for name, model in starts.items()}
        write_csv({**models, **arms}, results / f"{place}.csv")
        parts = [f"### {place}", _caption(arms), main_table(arms, models), contrast_table(arms, settings["contrasts"])]
        texts.append("\n\n".join(part for part in parts if part) + "\n")
        (results / f"{place}.md").write_text(texts[-1])
        shown = {name: arm for name, arm in arms.items() if name in SHOWN} or arms
        plot_curves(shown, results / f"{place}-curves.png")
        plot_pass_at_k({**models, **shown}, results / f"{place}-pass_at_k.png")
        plot_habits({**models, **shown}, results / f"{place}-habits.png")
    return "\n".join(texts)


def _model(name: str, path: Path) -> Arm:
    """A model as it is, measured as the arms are."""
    return Arm(name, {0: json.loads(path.read_text())})


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
    return _markdown([*columns, *of_runs], rows)


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
        _markdown(["question", "difference", "pass@1, points", "pass@64, points", "distinct of 64"], rows)
        if rows
        else ""
    )


def _minus(arm: Arm, other: Arm | None, value: Callable) -> str:
    """In points of percent; nothing where there is nothing to compare."""
    if (
        other is None
        or other is arm
        or not set(arm.runs) & set(other.runs)
        or "arm" not in next(iter(arm.runs.values()))
    ):
        return ""
    return arm.minus(other, value).text(100, sign="+")


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def write_csv(arms: dict[str, Arm], path: Path) -> None:
    """All measures of all arms: mean, interval, and where it is one of `COMPARED`, the difference to GRPO with its interval."""
    grpo = arms.get("grpo")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["arm", "seeds", "measure", "mean", "low", "high", "minus_grpo", "minus_grpo_low", "minus_grpo_high"]
        )
        for name, arm in arms.items():
            for measure, value in MEASURES.items():
                if measure in COSTS and name in ("start", "expert"):
                    continue
                shown = arm.estimate(value)
                row = [name, len(arm.runs), measure, *_numbers(shown)]
                if grpo and measure in COMPARED and name not in ("start", "expert"):
                    row += _numbers(arm.minus(grpo, value))
                writer.writerow(row)


def _numbers(estimate: Estimate) -> list[str]:
    return [f"{value:.5g}" for value in (estimate.mean, estimate.low, estimate.high)]


def plot_curves(arms: dict[str, Arm], path: Path) -> None:
    """pass@1, entropy, length and fillers of held-out answers over the updates; bands are 95 % over seeds."""
    panels = {
        "pass@1": "pass@1",
        "entropy": "entropy, nats",
        "length": "length, tokens",
        "filler": "answers with a filler",
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for arm in arms.values():
            steps, estimates = curve(arm, name)
            (line,) = axes.plot(steps, [each.mean for each in estimates], label=arm.name)
            low, high = [each.low for each in estimates], [each.high for each in estimates]
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_pass_at_k(arms: dict[str, Arm], path: Path) -> None:
    """Bands are 95 % over seeds and problems."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in arms.values():
        ks = [k for k in KS if k <= next(iter(arm.runs.values()))["final"]["num_samples"]]
        estimates = [arm.estimate(success(k)) for k in ks]
        style = {"start": "k:", "expert": "k--"}.get(arm.name, "o-")
        (line,) = axes.plot(ks, [each.mean for each in estimates], style, markersize=3, label=arm.name)
        if arm.name not in ("start", "expert"):
            low, high = [each.low for each in estimates], [each.high for each in estimates]
            axes.fill_between(ks, low, high, alpha=0.12, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1)
    axes.set_xlabel("k")
    axes.set_ylabel("pass@k, held-out problems")
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_habits(arms: dict[str, Arm], path: Path) -> None:
    """Which habits of the expert were adopted, and which of the start were kept: the idea of arXiv:2510.04140, Figure 3."""
    panels = {
        "fillers per answer (the expert's habit)": lambda run: np.array([run["final"]["habits"]["~"]]),
        "right answers that are as short as can be (the expert's)": whole("shortest"),
        "tokens per answer": whole("length"),
    }
    figure = Figure(figsize=(13, 0.9 + 0.38 * len(arms)), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        estimates = [arm.estimate(value) for arm in arms.values()]
        means = [each.mean for each in estimates]
        errors = [[each.mean - each.low for each in estimates], [each.high - each.mean for each in estimates]]
        axes.barh(
            list(arms), means, xerr=errors, color=["0.6" if name in ("start", "expert") else "C0" for name in arms]
        )
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def _save(figure: Figure, path: Path) -> None:
    """With one legend for all panels, above them."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
