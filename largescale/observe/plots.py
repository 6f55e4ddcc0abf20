"""The report's plots, drawn by matplotlib as SVG in one plain style."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # matplotlib 3.8 has no such name yet

INK, FAINT, ACCENT, SECOND = "#1f2933", "#9aa5b1", "#2f6fde", "#e08a1e"
CLASS_COLOURS = (
    "#2f6fde",
    "#e08a1e",
    "#2a9d6f",
    "#d1495b",
    "#8f63c7",
    "#8a5a3b",
    "#e377b0",
    "#6b7280",
    "#b5a511",
    "#1fa7b8",
)

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
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
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


def curves(
    title: str,
    steps: Sequence[float],
    lines: dict[str, Sequence[float]],
    *,
    references: dict[str, float] | None = None,
    ylim: tuple[float, float] | None = None,
) -> str:
    """One panel of curves over steps, as SVG; `references` are dashed horizontal lines by label."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.4, 2.9))
        for colour, (label, values) in zip((ACCENT, SECOND, "#2a9d6f"), lines.items(), strict=False):
            axes.plot(steps, values, color=colour, label=label)
        for label, value in (references or {}).items():
            axes.axhline(value, color=FAINT, linestyle="--", linewidth=1.2, label=label)
        axes.set_title(title)
        axes.set_xlabel("step")
        if ylim:
            axes.set_ylim(*ylim)
        elif not any(value for values in lines.values() for value in values):
            axes.set_ylim(0, 1)  # a scale of hundredths around zero would show differences where there are none
        if len(lines) + len(references or {}) > 1:
            axes.legend(loc="best", fontsize=8)
        return _svg(figure)


def accuracy_bars(accuracies: dict[str, dict[str, float]]) -> str:
    """Top-1 in percent as grouped bars: {protocol: {network: share}}."""
    with plt.rc_context(_STYLE):
        networks = dict.fromkeys(name for results in accuracies.values() for name in results)
        colours = dict(zip(networks, (ACCENT, "#a9b8d0", "#d3d9e2"), strict=False))
        num_bars = sum(map(len, accuracies.values()))
        figure, axes = plt.subplots(figsize=(5.4, 0.5 + 0.42 * num_bars))
        place, ticks, names = 0.0, [], []
        for protocol, results in accuracies.items():
            for network, share in results.items():
                axes.barh(place, 100 * share, color=colours[network], height=0.82)
                axes.text(100 * share + 0.6, place, f"{100 * share:.1f}", va="center", fontsize=9, fontweight="bold")
                ticks.append(place)
                names.append(f"{protocol} · {network}")
                place += 1
            place += 0.6
        axes.set_yticks(ticks, names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 108)
        axes.set_title("Top-1 on held-out labelled images, %")
        return _svg(figure)


def feature_map(points: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """A 2-D map of features coloured by class, as SVG."""
    with plt.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(8.4, 5.6))
        for number, name in enumerate(classes):
            of_class = points[labels == number]
            colour = CLASS_COLOURS[number % len(CLASS_COLOURS)]
            axes.scatter(
                of_class[:, 0], of_class[:, 1], s=7, color=colour, alpha=0.75, linewidths=0, label=name, rasterized=True
            )
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)
        if 1 < len(classes) <= 20:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=2.5, fontsize=9)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", dpi=160, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
