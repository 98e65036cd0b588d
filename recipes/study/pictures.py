"""Pictures of the arms of one comparison."""

from pathlib import Path

import numpy as np
from arms import KS, Arm, Estimate, curve, success, whole
from costs import SAMPLING, TOKENS, spent
from matplotlib.figure import Figure


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
        for index, arm in enumerate(arms.values()):
            _band(axes, arm.name, *curve(arm, name), f"C{index}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_costs(arms: dict[str, Arm], path: Path) -> None:
    """pass@1 over the tokens that models were run on until then, means over seeds; bands as in the curves."""
    panels = {"tokens of policy and expert while sampling": SAMPLING, "the same, and those in the loss": TOKENS}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for index, arm in enumerate(arms.values()):
            thousands = np.mean([spent(run, names) for run in arm.runs.values()], axis=0) / 1000
            if thousands[-1] > 0:  # supervised training samples nothing
                _band(axes, arm.name, thousands, curve(arm, "pass@1")[1], f"C{index}")
        axes.set_xlabel(f"{title}, thousands")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("pass@1")
    _save(figure, path)


def _band(axes, name: str, places, estimates: list[Estimate], color: str) -> None:
    axes.plot(places, [each.mean for each in estimates], color=color, label=name)
    low, high = [each.low for each in estimates], [each.high for each in estimates]
    axes.fill_between(places, low, high, alpha=0.15, color=color)


def plot_pass_at_k(arms: dict[str, Arm], path: Path) -> None:
    """Bands are 95 % over seeds and problems."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in arms.values():
        ks = [k for k in KS if k <= next(iter(arm.runs.values()))["final"]["num_samples"]]
        estimates = [arm.estimate(success(k)) for k in ks]
        style = {"start": "k:", "expert": "k--"}.get(arm.name, "o-")
        (line,) = axes.plot(ks, [each.mean for each in estimates], style, markersize=3, label=arm.name)
        if not arm.is_model:
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
        axes.barh(list(arms), means, xerr=errors, color=["0.6" if arm.is_model else "C0" for arm in arms.values()])
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)


def _save(figure: Figure, path: Path) -> None:
    """Save a picture with one legend for all panels, above them."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
