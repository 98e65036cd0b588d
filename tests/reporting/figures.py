"""What a figure shows."""

import numpy as np


def panels(figure):
    """Title -> axes."""
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def points(line):
    """The (x, y) of a line, gaps left out."""
    return [(x, y) for x, y in line.get_xydata().tolist() if np.isfinite(y)]


def names(legend):
    return [text.get_text() for text in legend.get_texts()]
