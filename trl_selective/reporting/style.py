"""How all pictures look: white, with colours that colour-blind readers tell apart, large enough to read at half their size. Needs the extra `plots`."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's, without yellow and black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
QUIET = "0.45"  # what explains a line style, and what others are compared with
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.6",
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.labelcolor": "black",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.color": "0.92",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.6,
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 150,
    "text.color": "black",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": "0.3",
    "xtick.labelsize": 8,
    "ytick.color": "0.3",
    "ytick.labelsize": 8,
}


@contextmanager
def picture(
    path: str | Path, num_panels: int, *, columns: int = 3, size: tuple[float, float] = (3.4, 2.5)
) -> Iterator[tuple["Figure", list["Axes"]]]:
    """A figure in our style with so many panels, saved once all is drawn.

    Args:
        path: image file; its suffix says the format. Missing folders are made.
        num_panels: how many panels, in rows of `columns`.
        size: width and height of a panel, inches.

    Raises:
        ImportError: without matplotlib.
        ValueError: if matplotlib does not know the suffix.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "trl-selective[plots]".') from error
    columns = min(num_panels, columns)
    rows = -(-num_panels // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows + 0.4), layout="constrained")
        yield figure, [figure.add_subplot(rows, columns, 1 + number) for number in range(num_panels)]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def colours(names: Iterable[str]) -> dict[str, str]:
    """One colour for each name: of the palette, or of a scale that grows lighter if there are more names than the palette has."""
    names = list(names)
    if len(names) <= len(PALETTE):
        return dict(zip(names, PALETTE, strict=False))
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["viridis"]
    return {name: to_hex(scale(0.85 * number / (len(names) - 1))) for number, name in enumerate(names)}


def label_panel(axes: "Axes", title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set(xlabel=x_label, ylabel=y_label)


def legend_above(figure: "Figure", looks: Mapping[str, Mapping[str, Any]]) -> None:
    """What holds for all panels, above them: name -> how its line looks."""
    width = 0.07 * max(map(len, looks)) + 0.6  # inches that the longest name takes
    columns = int(np.clip(figure.get_figwidth() // width, 1, len(looks)))
    figure.legend(_lines(looks), list(looks), loc="outside upper left", ncols=columns)


def legend_below_title(axes: "Axes", looks: Mapping[str, Mapping[str, Any]]) -> None:
    """What holds for one panel, between its title and the picture: name -> how its line looks."""
    columns = int(np.clip(36 // max(map(len, looks)), 1, 3))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0.0, "borderaxespad": 0.3}
    axes.legend(_lines(looks), list(looks), ncols=columns, fontsize=8, columnspacing=1.0, **place)
    axes.set_title(axes.get_title(loc="left"), pad=8 + 12 * -(-len(looks) // columns))


def share_steps(all_axes: Iterable["Axes"]) -> None:
    """One range of whole steps for all panels."""
    limits = np.array([axes.dataLim.intervalx for axes in all_axes])
    first, last = limits[:, 0].min(), limits[:, 1].max()
    margin = 0.02 * (last - first) or 0.5
    for axes in all_axes:
        axes.set_xlim(first - margin, last + margin)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _lines(looks: Mapping[str, Mapping[str, Any]]) -> list["Line2D"]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], **{"color": QUIET, **look}) for look in looks.values()]
