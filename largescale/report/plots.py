"""The report's plots, drawn by matplotlib in one plain style, for the page and as files for papers.

In the page, colours are CSS variables that follow the reader's light or dark scheme (report.css). Lines differ in
colour, from a palette that colour-blind people can tell apart, and in dash.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from largescale.report.html_parts import escape
from shards.ground.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # matplotlib 3.8 has no such name yet

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
PALETTE = ("#0072b2", "#d55e00", "#00805c", "#a8457f", "#8f6200", "#5b5bd6", "#3d4852", "#00839c", "#7a4419", "#5a7d00")
_DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_VARIABLES = {INK: "currentColor", FAINT: "var(--faint)", GRID: "var(--grid)"} | {
    colour: f"var(--line-{number})" for number, colour in enumerate(PALETTE)
}
MAX_POINTS = 500
"""Points that a curve is drawn with; more are averaged."""

_STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.parse_math": False,  # names of runs and classes may hold what looks like TeX
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "largescale",
    "lines.linewidth": 1.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Line:
    """A curve: its label, values over steps (NaN where there is none), and a number that gives its colour and dash."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    number: int


def colour(number: int) -> str:
    """The colour of a line."""
    return PALETTE[number % len(PALETTE)]


def curves(
    title: str,
    lines: Sequence[Line],
    *,
    references: dict[str, float] | None = None,
    limits: tuple[float, float] | None = None,
    smooth: int = 0,
    log: bool = False,
    legend: bool = True,
) -> Figure:
    """One panel of curves over steps.

    Args:
        title: above the panel.
        lines: the curves.
        references: values of dashed horizontal lines by label.
        limits: of the vertical axis.
        smooth: logged lines that a running average spans; what it averages stays as a faint line. 0 does not smooth.
        log: both axes logarithmic; the first step is 1. What is not above 0 is left out, and some value must be.
        legend: whether lines are named in the panel; references always are.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 2.9))
        for line in lines:
            _draw(axes, line, smooth, log, legend)
        references = {label: value for label, value in (references or {}).items() if value > 0 or not log}
        for label, value in references.items():
            axes.axhline(value, color=FAINT, linestyle="--", linewidth=1.2, label=label)
        axes.set_title(title)
        axes.set_xlabel("step")
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):  # the usual labels of powers are TeX
                axis.set_major_formatter(LogFormatter())
                axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        elif limits:
            axes.set_ylim(*limits)
        elif not any(value for line in lines for value in line.values):
            axes.set_ylim(0, 1)  # a scale of hundredths around zero would show differences where there are none
        handles = axes.get_legend_handles_labels()[0]
        if len(handles) > 1 or references:
            axes.legend(loc="best", fontsize=8)
        return figure


def _draw(axes: Any, line: Line, smooth: int, log: bool, legend: bool) -> None:
    steps, values = np.asarray(line.steps, float) + log, np.asarray(line.values, float)
    known = np.isfinite(values) & (values > 0 if log else True)
    steps, values = steps[known], values[known]
    style = {"color": colour(line.number), "linestyle": _DASHES[line.number % len(_DASHES)]}
    label = line.label if legend else None
    if len(values) == 1:
        axes.plot(steps, values, marker="o", markersize=4, label=label, **style)
        return
    if smooth > 1 and len(values) > 2:
        axes.plot(*_thinned(steps, values), color=style["color"], linewidth=0.7, alpha=0.35)
        values = smoothed(values, smooth)
    axes.plot(*_thinned(steps, values), label=label, **style)


def smoothed(values: np.ndarray, span: int) -> np.ndarray:
    """Running average of values [N] with exponentially falling weights, about `span` values long, unbiased from the
    first value on."""
    keep = 1 - 2 / (span + 1)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for place, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        out[place] = total / weight
    return out


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(values) <= MAX_POINTS:
        return steps, values
    parts = [part for part in np.array_split(np.arange(len(values)), MAX_POINTS) if len(part)]
    return np.array([steps[part[-1]] for part in parts]), np.array([values[part].mean() for part in parts])


def bars(title: str, values: Sequence[tuple[str, float, float, float, int]]) -> Figure:
    """Horizontal bars of percentages with their intervals: (label, value, low, high, number of the colour)."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 0.6 + 0.36 * len(values)))
        for place, (_, value, low, high, number) in enumerate(values):
            axes.barh(place, value, color=colour(number), alpha=0.85, height=0.74)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.4)
            axes.text(high + 1, place, f"{value:.1f}", va="center", fontsize=9, fontweight="bold")
        axes.set_yticks(range(len(values)), [label for label, *_ in values])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 110)
        axes.set_xticks(range(0, 101, 20))
        axes.set_title(title)
        return figure


def scatter(points: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> Figure:
    """A map of points [N, 2] coloured by group [N]; for files, the page has one to point at (feature_map.py)."""
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(8.4, 5.6))
        for number, name in enumerate(names):
            x, y = points[groups == number].T
            mark = "os^vDPX*"[number // len(PALETTE) % 8]
            axes.scatter(x, y, s=9, color=colour(number), marker=mark, alpha=0.75, linewidths=0, label=name)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if 1 < len(names) <= 20:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2, fontsize=9)
        return figure


def legend(lines: Sequence[tuple[str, int]]) -> str:
    """Labels of several lines with their colours and dashes, once for all panels of a page; empty for a single line.

    Args:
        lines: label and number of each.
    """
    if len(lines) < 2:
        return ""
    dashes = ("", "6 2", "2 2", "6 2 2 2")
    names = "".join(
        f'<li><svg width="34" height="8" aria-hidden="true"><line x2="34" y1="4" y2="4" stroke-width="3" '
        f'stroke="var(--line-{number % len(PALETTE)})" stroke-dasharray="{dashes[number % 4]}"/></svg>'
        f"{escape(label)}</li>"
        for label, number in lines
    )
    return f'<ul class="legend">{names}</ul>'


def in_page(figure: Figure, name: str, alt: str) -> str:
    """A figure as an element of the page; closes it.

    Args:
        figure: what to show.
        name: a word that no other figure of the page has.
        alt: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with plt.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\1{name}-", text)  # ids of all figures share one page
    for colour_, variable in _VARIABLES.items():
        text = text.replace(colour_, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as NAME.svg and NAME.png (300 dpi) on white; closes it."""
    paths = []
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        with plt.rc_context(_STYLE):
            figure.savefig(buffer, format=kind, bbox_inches="tight", dpi=300, facecolor="white", metadata=metadata)
        paths.append(folder / f"{name}.{kind}")
        with atomic_write(paths[-1]) as file:
            file.write(buffer.getvalue())
    plt.close(figure)
    return paths
