"""The page about a pruning: one self-contained file, with the curves of other prunings of the same run."""

from __future__ import annotations

import time
from pathlib import Path

from largescale.prune import record
from largescale.prune.curve import Point, figure_of, measured_by, points_of, read_curve
from largescale.report import plots
from largescale.report.html_parts import document, escape, missing, section, table
from shards.ground.files import atomic_write

PAGE = "pruning.html"


def write_page(path: Path, run: Path, out: Path) -> None:
    """Write the page.

    Args:
        path: the file.
        run: folder of the run that is pruned.
        out: folder of the rounds; curves of the same run in folders beside it are drawn too.
    """
    points = points_of(run, out)
    says = f"{run.name}, {len(points) - 1} rounds. Made {time.strftime('%Y-%m-%d %H:%M:%S')}."
    header = f"<h1>Pruning</h1><p>{escape(says)}</p>"
    page = document("Pruning", header, _curves(points, out) + _rounds(points))
    with atomic_write(path) as file:
        file.write(page.encode())


def _curves(points: list[Point], out: Path) -> str:
    title = "Accuracy against the share of weights left"
    pruned = record.pruned_in(out)
    folders = [
        folder for folder in sorted(out.parent.iterdir()) if folder != out and record.pruned_in(folder) == pruned
    ]
    beside = {folder.name: read_curve(folder) for folder in folders}
    curves = {out.name: points} | {name: others for name, others in beside.items() if others}
    protocols = measured_by(points)
    if not protocols:
        return section(title, "", missing("Nothing is measured yet. Pass --evaluate linear, or evaluate the rounds."))
    figures = "".join(
        f"<div>{plots.in_page(figure_of(protocol, curves), f'curve-{number}', _alt(protocol, points))}</div>"
        for number, protocol in enumerate(protocols)
    )
    text = "Each point is a network that was trained with that share of its convolutions' weights, the others zero."
    legend = plots.legend([(name, number) for number, name in enumerate(curves)])
    return section(title, text, f'{legend}<div class="grid">{figures}</div>')


def _alt(protocol: str, points: list[Point]) -> str:
    known = [point for point in points if protocol in point.accuracies]
    said = ", ".join(f"{point.accuracies[protocol]:.1f}% with {point.share:.3g}% of weights" for point in known)
    return f"{protocol}: {said}"


def _rounds(points: list[Point]) -> str:
    protocols = measured_by(points)
    rows = [
        (
            "the run" if point.round == 0 else f"{point.round}",
            f"{point.share:.3g}%",
            f"{point.left:,}",
            point.state,
            "" if point.loss is None else f"{point.loss:.4f}",
            *(f"{point.accuracies[name]:.1f}" if name in point.accuracies else "" for name in protocols),
        )
        for point in points
    ]
    heads = ("round", "left", "weights", "state", "loss", *protocols)
    return section("Rounds", "", table("Rounds of pruning", heads, rows, numbers_from=1))
