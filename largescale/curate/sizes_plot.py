"""Sizes of clusters before and after, as a plot."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from largescale.curate.result import LevelSizes
from largescale.report import plots

_POINTS = 400


def sizes_figure(title: str, level: LevelSizes) -> Figure:
    """Images per cluster, each sorted by size, both axes logarithmic."""
    lines = []
    for number, (label, sizes) in enumerate((("before", level.before), ("after", level.after))):
        ordered = np.sort(sizes)[::-1]
        ordered = ordered[ordered > 0].astype(float)
        ranks = np.unique(np.geomspace(1, max(1, len(ordered)), min(_POINTS, max(1, len(ordered)))).astype(int))
        values = ordered[ranks - 1] if len(ordered) else np.ones(1)
        lines.append(plots.Line(label, (ranks - 1).tolist(), values.tolist(), number))  # the first step of a plot is 0
    figure = plots.curves(title, lines, log=True)
    axes = figure.axes[0]
    axes.set_xlabel("cluster, the largest first")
    axes.set_ylabel("images")
    return figure
