"""The pruning curve: accuracies against the share of weights left."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from largescale.checkpoint.mask_file import read_about
from largescale.checkpoint.state_file import read_state
from largescale.evaluate.headline import headlines
from largescale.observe.metrics import last_row
from largescale.prune.rounds import MASK, name_of
from largescale.report import plots
from largescale.run.status import status_of

CURVE = "curve.json"


@dataclass(frozen=True)
class Point:
    """A round; 0 is the run that is pruned.

    Attributes:
        left, weights: of the convolutions, those that are trained and all.
        state: of its training.
        loss: the last logged one; None before any.
        accuracies: percentages by protocol, as far as it was measured.
    """

    round: int
    left: int
    weights: int
    state: str
    loss: float | None
    accuracies: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Percentage of the weights that are left."""
        return 100 * self.left / max(1, self.weights)


def points_of(run: Path, out: Path) -> list[Point]:
    """The run and all rounds that have a mask, by their files."""
    points: list[Point] = []
    number = 1
    while (path := out / name_of(number) / MASK).is_file():
        counts = _counts(path)
        if not points:
            points.append(_point(run, 0, counts.left_in_run, counts.weights))
        points.append(_point(path.parent, number, counts.left, counts.weights))
        number += 1
    return points


class _Counts(NamedTuple):
    """Of weights under a mask: those left, all, and those left in the run that is pruned."""

    left: int
    weights: int
    left_in_run: int


def _counts(path: Path) -> _Counts:
    """What a file says of its masks, which are then not read; counted in a file of others."""
    about = read_about(path)
    if all(about.get(name, "").isdecimal() for name in _Counts._fields):
        return _Counts(*(int(about[name]) for name in _Counts._fields))
    masks = read_state(path).tensors.values()
    left, weights = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    return _Counts(left, weights, weights)


def _point(run: Path, number: int, left: int, weights: int) -> Point:
    row = last_row(run)
    return Point(number, left, weights, status_of(run).state, row["loss"] if row else None, headlines(run))


def measured_by(points: list[Point]) -> list[str]:
    """Protocols that a round was measured by; what only the run was measured by makes no curve."""
    return sorted({name for point in points if point.round for name in point.accuracies})


def told(points: list[Point]) -> str:
    """A table for a terminal."""
    protocols = measured_by(points)
    rows = [["round", "left", "weights", "state", "loss", *protocols]]
    for point in points:
        values = [f"{point.accuracies[name]:.1f}" if name in point.accuracies else "-" for name in protocols]
        loss = "-" if point.loss is None else f"{point.loss:.4f}"
        rows.append([str(point.round), f"{point.share:.3g}%", f"{point.left:,}", point.state, loss, *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def read_curve(out: Path) -> list[Point]:
    """The curve that a pruning has written; empty if there is none."""
    try:
        return [Point(**row) for row in json.loads((out / CURVE).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def figure_of(protocol: str, curves: dict[str, list[Point]]) -> Figure:
    """Accuracies by one protocol against the share of weights left, on a logarithmic axis from all to few.

    Lines are numbered in the order of their curves; the page has one legend for all figures, where it covers none.

    Args:
        protocol: that the rounds were measured by.
        curves: points by the name of their pruning.
    """
    lines = []
    for number, (label, points) in enumerate(curves.items()):
        known = [point for point in points if protocol in point.accuracies]
        shares, values = [point.share for point in known], [point.accuracies[protocol] for point in known]
        lines.append(plots.Line(label, shares, values, number))
    figure = plots.curves(f"{protocol} (%)", lines, legend=False)
    axes = figure.axes[0]
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = [tick for tick in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if tick >= 0.9 * _smallest(curves)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("weights left (%)")
    return figure


def _smallest(curves: dict[str, list[Point]]) -> float:
    return min((point.share for points in curves.values() for point in points), default=100.0)
