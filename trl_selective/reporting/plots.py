"""Pictures of training runs and evaluations. Needs the extra `plots`."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from trl_selective.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Title, unit of the vertical axis, and the metrics with how their lines are drawn. A panel without data is left out.
PANELS = (
    ("reward of the policy", "reward", {"reward": "-"}),
    ("reward of guided rollouts", "reward", {"guidance/reward/guided": "-"}),
    ("groups without signal (dashed: rescued)", "share", {"frac_reward_zero_std": "-", "guidance/rescued_groups": "--"}),
    ("injected rows (dashed: accepted completions)", "share", {"guidance/injection/rows": "-", "guidance/injection/accepted": "--"}),
    ("log-prob of injected tokens (dashed: after)", "nats", {"guidance/injection/logp": "-", "guidance/injection/logp_after": "--"}),
    ("guidance coefficient alpha", "alpha", {"guidance/coef": "-"}),
    ("weight w (dashed: tokens the expert drew)", "share", {"guidance/weight": "-", "guidance/expert_drawn": "--"}),
    ("entropy of the policy (dashed: threshold)", "nats", {"entropy": "-", "guidance/entropy_threshold": "--"}),
    ("completion length (dashed: guided)", "tokens", {"completions/mean_length": "-", "guidance/completions/mean_length": "--"}),
    ("importance ratio (dashed: effective sample)", "", {"guidance/importance_ratio/mean": "-", "guidance/importance_ratio/ess": "--"}),
)  # fmt: skip
COLUMNS = 3


def plot_training_dynamics(runs: Mapping[str, Sequence[Mapping]], path: str | Path) -> None:
    """
    Draw how runs went, one panel per quantity, one colour per run.

    Args:
        runs: name -> `trainer.state.log_history`.
        path: image file, e.g. with suffix `.png` or `.pdf`.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no run logged anything that there is a panel for.
    """
    panels = [panel for panel in PANELS if any(_curve(history, m) for history in runs.values() for m in panel[2])]
    if not panels:
        raise ValueError(f"None of the runs {list(runs)} logged a metric of GRPO. Train with `logging_steps` set.")
    figure = _figure(len(panels))
    for number, (title, unit, metrics) in enumerate(panels, start=1):
        axes = _axes(figure, number, len(panels), title, "step", unit)
        for (name, history), colour in zip(runs.items(), cycle(f"C{i}" for i in range(10)), strict=False):
            for metric, style in metrics.items():
                if curve := _curve(history, metric):
                    axes.plot(*zip(*curve, strict=True), style, color=colour, label=name if style == "-" else None)
    _legend(figure)
    figure.savefig(path, dpi=150)


def plot_pass_at_k(evaluations: Mapping[str, Evaluation], path: str | Path) -> None:
    """
    Draw pass@k over k, with a band of one standard error over problems.

    Args:
        evaluations: name -> result, as `evaluate` returns it.
        path: image file.

    Raises:
        ImportError: without matplotlib.
    """
    figure = _figure(1)
    axes = _axes(figure, 1, 1, "chance that one of k samples is right", "k", "pass@k")
    for name, evaluation in evaluations.items():
        ks = sorted(evaluation.pass_at_k)
        means = [evaluation.pass_at_k[k] for k in ks]
        low, high = (
            [m + sign * evaluation.standard_error[k] for k, m in zip(ks, means, strict=True)] for sign in (-1, 1)
        )
        axes.plot(ks, means, "o-", markersize=3, label=name)
        axes.fill_between(ks, low, high, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1)
    _legend(figure)
    figure.savefig(path, dpi=150)


def _curve(history: Sequence[Mapping], metric: str) -> list[tuple[int, float]]:
    """(step, value) of the entries that have a value; the closing summary of a run is not one of them."""
    return [
        (entry["step"], entry[metric])
        for entry in history
        if entry.get(metric) is not None and "train_runtime" not in entry
    ]


def _figure(num_panels: int) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "trl-selective[plots]".') from error
    columns = min(num_panels, COLUMNS)
    rows = -(-num_panels // columns)
    return Figure(figsize=(4.6 * columns, 3.0 * rows + 0.5), layout="constrained")


def _axes(figure: "Figure", number: int, num_panels: int, title: str, x_label: str, y_label: str) -> "Axes":
    columns = min(num_panels, COLUMNS)
    axes = figure.add_subplot(-(-num_panels // columns), columns, number)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return axes


def _legend(figure: "Figure") -> None:
    """One legend for all panels, above them."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
