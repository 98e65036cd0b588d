"""Pictures of training runs and evaluations. Needs the extra `plots`."""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trl_selective.reporting.pass_at_k_plots import draw_pass_at_k, pass_at_k_curve
from trl_selective.reporting.style import (
    DASHES,
    colours,
    label_panel,
    legend_above,
    legend_below_title,
    picture,
    share_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trl_selective.evaluation import Evaluation

History = Sequence[Mapping]  # `trainer.state.log_history`
NOT_METRICS = ("step", "epoch")
FEW = 30  # values that are marked one by one
MANY = 200  # values of which a running mean is shown


class Panel(NamedTuple):
    """One quantity.

    Attributes:
        title: above the panel.
        unit: of the vertical axis.
        lines: metric -> what its line is called.
    """

    title: str
    unit: str
    lines: Mapping[str, str]


# A panel without data is left out.
PANELS = (
    Panel("reward of the policy", "reward", {"reward": "mean"}),
    Panel("reward by kind of rollout", "reward", {
        "guidance/reward/on_policy": "policy", "guidance/reward/guided": "guided", "guidance/reward/injected": "injected",
    }),
    Panel("groups", "share", {"frac_reward_zero_std": "without signal", "guidance/rescued_groups": "rescued"}),
    Panel("entropy of the policy", "nats", {"entropy": "mean", "guidance/entropy_threshold": "threshold"}),
    Panel("completion length", "tokens", {
        "completions/mean_length": "policy", "guidance/completions/mean_length": "guided",
        "guidance/injection/completions/mean_length": "injected",
    }),
    Panel("guidance coefficient", "factor", {"guidance/coef": "alpha"}),
    Panel("weight of the expert", "share", {"guidance/weight": "w", "guidance/expert_drawn": "tokens it drew"}),
    Panel("injected completions", "share", {
        "guidance/injection/rows": "of rows", "guidance/injection/groups": "of groups", "guidance/injection/accepted": "accepted",
    }),
    Panel("log-prob of injected tokens", "nats", {"guidance/injection/logp": "before", "guidance/injection/logp_after": "after the update"}),
    Panel("importance of guided tokens", "", {"guidance/importance_ratio/mean": "mean ratio", "guidance/importance_ratio/ess": "effective share"}),
)  # fmt: skip


def plot_training_dynamics(
    runs: Mapping[str, History], path: str | Path, *, metrics: Sequence[str] = (), smooth: int | None = None
) -> None:
    """
    Draw how runs went, one panel per quantity, one colour per run. A logged None or NaN is a gap in its line.

    Args:
        runs: name -> `trainer.state.log_history`.
        path: image file, e.g. with suffix `.png`, `.pdf` or `.svg`.
        metrics: what to draw instead of `PANELS`: one panel for each name, or for all names that fit a pattern such as `rewards/*`.
        smooth: logged values in the running mean that is drawn, 1 for the values themselves. By default a fiftieth of them if there are more
            than 200.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no run logged anything that there is a panel for, or one of `metrics`; or if `smooth` is below 1.
    """
    if smooth is not None and smooth < 1:
        raise ValueError(f"smooth must be at least 1, got {smooth}. It counts logged values.")
    logged = logged_metrics(runs.values())
    panels = _chosen_panels(metrics, logged) if metrics else _default_panels(logged)
    if not panels:
        raise ValueError(f"None of the runs {list(runs)} logged a metric of GRPO. Train with `logging_steps` set.")
    with picture(path, len(panels)) as (figure, all_axes):
        for panel, axes in zip(panels, all_axes, strict=True):
            _draw_panel(axes, panel, runs, smooth)
        share_steps(all_axes)
        if len(runs) > 1:
            legend_above(figure, {name: {"color": colour} for name, colour in colours(runs).items()})
        else:
            figure.suptitle(next(iter(runs)), x=0.01, horizontalalignment="left", fontsize="medium")


def plot_pass_at_k(evaluations: Mapping[str, "Evaluation"], path: str | Path) -> None:
    """
    Draw pass@k over k, with a band of 95 % over problems.

    Args:
        evaluations: name -> result, as `evaluate` returns it.
        path: image file.

    Raises:
        ImportError: without matplotlib.
    """
    curves = {name: pass_at_k_curve(evaluation.is_correct) for name, evaluation in evaluations.items()}
    draw_pass_at_k({"chance that one of k samples is right": curves}, path)


def logged_metrics(histories: Collection[History]) -> list[str]:
    """Names of all metrics that have a number somewhere, in the order in which they were logged."""
    names = dict.fromkeys(name for history in histories for entry in history for name in entry)
    return [
        name
        for name in names
        if name not in NOT_METRICS and any(np.isfinite(curve(history, name)[1]).any() for history in histories)
    ]


def curve(history: History, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the entries with this metric, NaN where it has no value; the closing summary of a run is not one of them."""
    points = [
        (entry["step"], entry[metric] if isinstance(entry[metric], int | float) else np.nan)
        for entry in history
        if metric in entry and "train_runtime" not in entry
    ]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to `window` values around each one, of those that are there; a gap stays a gap."""
    if not len(values):
        return values
    known, kernel = ~np.isnan(values), np.ones(min(window, 2 * len(values) - 1))  # more reach nothing more
    around = slice(len(kernel) // 2, len(kernel) // 2 + len(values))
    total, count = (np.convolve(each, kernel)[around] for each in (np.where(known, values, 0.0), known.astype(float)))
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _default_panels(logged: Sequence[str]) -> list[Panel]:
    """`PANELS`, one for each prefix of pass@k, and one for each measure of diversity, as far as there is data."""
    panels = [
        panel._replace(lines={metric: name for metric, name in panel.lines.items() if metric in logged})
        for panel in PANELS
    ]
    pass_at_k = [metric for metric in logged if "pass@" in metric]
    for prefix in dict.fromkeys(metric.partition("pass@")[0] for metric in pass_at_k):
        lines = {metric: metric.removeprefix(prefix) for metric in pass_at_k if metric.startswith(f"{prefix}pass@")}
        panels.append(Panel(f"{prefix}pass@k", "share", lines))
    panels += [Panel(metric, "", {metric: metric}) for metric in logged if "diversity/" in metric]
    return [panel for panel in panels if panel.lines]


def _chosen_panels(metrics: Sequence[str], logged: Sequence[str]) -> list[Panel]:
    unknown = [each for each in metrics if not fnmatch.filter(logged, each)]
    if unknown:
        raise ValueError(f"Nothing was logged as {unknown}. Metrics that were: {sorted(logged)}.")
    found = dict.fromkeys(metric for each in metrics for metric in fnmatch.filter(logged, each))
    return [Panel(metric, "", {metric: metric}) for metric in found]


def _draw_panel(axes: "Axes", panel: Panel, runs: Mapping[str, History], smooth: int | None) -> None:
    """Colours tell runs apart, and dashes the lines of one run; where there is one run, colours tell its lines apart."""
    by_run, by_line = colours(runs), colours(panel.lines)
    dashes = dict(zip(panel.lines, cycle(DASHES), strict=False))
    windows = {1}
    for metric in panel.lines:
        for name, history in runs.items():
            steps, values = curve(history, metric)
            look: dict[str, Any] = {"color": by_line[metric]}
            if len(runs) > 1:
                look = {"color": by_run[name], "linestyle": dashes[metric]}
            windows.add(window := smooth or _default_window(len(values)))
            if window > 1:
                axes.plot(steps, values, **look, linewidth=0.6, alpha=0.3 / len(runs))
            shown = running_mean(values, window)
            axes.plot(steps, shown, **look, marker="o", markersize=2.5, markevery=_marked(shown))
    label_panel(axes, panel.title, f"step (means of {max(windows)})" if max(windows) > 1 else "step", panel.unit)
    if list(panel.lines.values()) != [panel.title]:
        key = {"color": by_line} if len(runs) == 1 else {"linestyle": dashes}
        legend_below_title(
            axes, {name: {k: v[metric] for k, v in key.items()} for metric, name in panel.lines.items()}
        )


def _default_window(num_values: int) -> int:
    """Odd: as many before a value as after it."""
    return 1 if num_values <= MANY else num_values // 50 | 1


def _marked(values: np.ndarray) -> list[int]:
    """All of a few values; of many, those between two gaps."""
    gap = np.isnan(np.concatenate([[np.nan], values, [np.nan]]))
    marked = ~gap[1:-1] if len(values) <= FEW else ~gap[1:-1] & gap[:-2] & gap[2:]
    return np.flatnonzero(marked).tolist()
