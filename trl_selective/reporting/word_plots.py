"""Pictures of how often models use words. Needs the extra `plots`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trl_selective.reporting.style import colours, label_panel, legend_above, picture, share_steps
from trl_selective.reporting.words import WordCounts

Role = Literal["policy", "expert", "trained"]
FIXED: dict[str, dict[str, Any]] = {
    "policy": {"color": "0.45", "marker": "o", "markerfacecolor": "white"},
    "expert": {"color": "black", "marker": "D"},
}


@dataclass(frozen=True)
class Usage:
    """How often one model uses words.

    Attributes:
        name: what it is called.
        role: `policy` is the start and `expert` the guide, `trained` what came of them.
        counts: what was counted; several for a model that was watched while it learned.
        steps: first and last step of each of the counts, if it was.
    """

    name: str
    role: Role
    counts: list[WordCounts]
    steps: list[tuple[int, int]] | None = None


def plot_words(usages: Sequence[Usage], words: Sequence[str], path: str | Path) -> None:
    """
    Draw how often words occur: their share of completions over training if one of the models was watched while it learned, else both rates side by
    side.

    Args:
        usages: the models.
        words: as `count_words` names them.
        path: image file.

    Raises:
        ImportError: without matplotlib.
    """
    draw = _draw_over_training if any(usage.steps for usage in usages) else _draw_rates
    draw(usages, words, path)


def _looks(usages: Sequence[Usage]) -> dict[str, dict[str, Any]]:
    """How each model is drawn: policy and expert in grey and black, the trained ones in colours."""
    trained = colours(usage.name for usage in usages if usage.role == "trained")
    return {usage.name: FIXED.get(usage.role) or {"color": trained[usage.name], "marker": "o"} for usage in usages}


def _draw_rates(usages: Sequence[Usage], words: Sequence[str], path: str | Path) -> None:
    """One line per word, with a mark for each model."""
    rates: dict[str, tuple[str, Callable[[WordCounts, str], float]]] = {
        "completions with the word": ("%", lambda counts, word: 100 * counts.share(word)),
        "occurrences": ("per 1,000 words", WordCounts.per_thousand),
    }
    places = range(len(words))
    with picture(path, len(rates), size=(4.2, 0.24 * len(words) + 0.9)) as (figure, all_axes):
        look = {name: {"linestyle": "", "markersize": 5, **each} for name, each in _looks(usages).items()}
        for axes, (title, (unit, rate)) in zip(all_axes, rates.items(), strict=True):
            values = {usage.name: [rate(usage.counts[0], word) for word in words] for usage in usages}
            low, high = (list(map(end, zip(*values.values(), strict=True))) for end in (min, max))
            axes.hlines(places, low, high, color="0.85", zorder=1)
            for name, of_words in values.items():
                axes.plot(of_words, places, **look[name])
            label_panel(axes, title, unit, "")
            axes.set_yticks(places, words if axes is all_axes[0] else [""] * len(words))
            axes.set_ylim(len(words) - 0.4, -0.6)
            axes.set_xlim(left=-0.02 * max(high))
        legend_above(figure, look)


def _draw_over_training(usages: Sequence[Usage], words: Sequence[str], path: str | Path) -> None:
    """One panel per word, with a curve for each model that was watched, and a dashed line for each other one."""
    with picture(path, len(words), columns=4, size=(2.6, 2.0)) as (figure, all_axes):
        look = {name: {"color": each["color"]} for name, each in _looks(usages).items()}
        look |= {usage.name: {**look[usage.name], "linestyle": "--"} for usage in usages if not usage.steps}
        for axes, word in zip(all_axes, words, strict=True):
            for usage in usages:
                shares = [100 * counts.share(word) for counts in usage.counts]
                if usage.steps:
                    middle = [(first + last) / 2 for first, last in usage.steps]
                    axes.plot(middle, shares, marker="o", markersize=2.5, **look[usage.name])
                else:
                    axes.axhline(shares[0], **look[usage.name])
            label_panel(axes, word, "step", "completions, %")
            axes.set_ylim(bottom=0)
        share_steps(all_axes)
        legend_above(figure, look)
