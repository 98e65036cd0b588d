"""Curves of pass@k with what they leave open. Needs the extra `plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trl_selective.functional.diversity import pass_at_k
from trl_selective.intervals import bootstrap
from trl_selective.reporting.style import colours, label_panel, legend_above, picture


class Curve(NamedTuple):
    """pass@k of one model on one benchmark, and the ends of its 95 % interval over problems, for k = 1, 2, ..."""

    mean: list[float]
    low: list[float]
    high: list[float]


def pass_at_k_curve(is_correct: Sequence[Sequence[bool]]) -> Curve:
    """From whether the samples of each problem are right: without bias, for every k up to the smallest number of samples. One problem says nothing
    about others, and has no interval."""
    num_samples = torch.tensor([len(samples) for samples in is_correct])
    num_correct = torch.tensor([sum(samples) for samples in is_correct])
    ks = range(1, int(num_samples.min()) + 1)
    estimates = [bootstrap(pass_at_k(num_samples, num_correct, k).double().numpy()[np.newaxis]) for k in ks]
    mean, low, high = ([getattr(each, end) for each in estimates] for end in Curve._fields)
    nothing = [np.nan] * len(ks)
    return Curve(mean, low, high) if len(is_correct) > 1 else Curve(mean, nothing, nothing)


def draw_pass_at_k(panels: Mapping[str, Mapping[str, Curve]], path: str | Path) -> None:
    """
    Draw curves of pass@k: one panel per benchmark, one colour per model.

    Args:
        panels: benchmark -> model -> its curve.
        path: image file.

    Raises:
        ImportError: without matplotlib.
    """
    size = (5.2, 3.4) if len(panels) == 1 else (3.4, 2.7)
    with picture(path, len(panels), size=size) as (figure, all_axes):
        models = colours(dict.fromkeys(model for panel in panels.values() for model in panel))
        for (benchmark, curves), axes in zip(panels.items(), all_axes, strict=True):
            label_panel(axes, benchmark, "k", "pass@k, %")
            for model, each in curves.items():
                ks, percent = range(1, len(each.mean) + 1), 100 * np.array(each)
                axes.plot(ks, percent[0], color=models[model], marker="o" if len(ks) == 1 else "")
                axes.fill_between(ks, percent[1], percent[2], color=models[model], alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.set_ylim(0, 101)
        legend_above(figure, {model: {"color": colour} for model, colour in models.items()})
