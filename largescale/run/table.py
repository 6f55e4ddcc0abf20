"""`largescale runs`: a table of all runs below a folder, read from a few small files of each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from largescale.evaluate.headline import headlines
from largescale.observe.console import format_seconds
from largescale.observe.metrics import METRICS, last_row
from largescale.run.status import STATUS, status_of
from shards.ground.errors import InputError, line_of

_SIGNS = (STATUS, METRICS, "checkpoints")
"""What tells the folder of a run from others."""
PRUNING = "pruning.json"
"""What `largescale prune` writes into a folder of rounds, each of which is a run."""


@dataclass(frozen=True)
class RunRow:
    """One run. Its folder is all that is known of a damaged one, and what is wrong.

    Attributes:
        path: below the folder that was searched.
        accuracies: of the newest evaluations, as percentages by protocol.
        age_s: seconds since the run last wrote its metrics or status.
        damage: why the folder cannot be read; empty if it can.
    """

    path: str
    state: str = ""
    step: int | None = None
    steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    images_per_s: float | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    age_s: float | None = None
    damage: str = ""


def runs_below(folder: Path) -> list[RunRow]:
    """All runs below a folder, by path; links to folders are not followed.

    Raises:
        InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pass one that holds runs, such as runs")
    return [_row(path, str(path.relative_to(folder))) for path in _run_folders(folder)]


def listing(folder: Path, *, as_json: bool = False) -> str:
    """All runs below a folder as text for a terminal, or as a JSON list.

    Raises:
        InputError: no such folder.
    """
    rows = runs_below(folder)
    if as_json:
        return json.dumps([asdict(row) for row in rows], indent=1)
    return table(rows) if rows else f"{folder}: no runs below this folder"


def table(rows: list[RunRow]) -> str:
    """The rows for a terminal; columns that no run fills are left out."""
    protocols = sorted({name for row in rows for name in row.accuracies})
    heads = ["run", "state", "step", "done", "loss", "images/s", *(f"{name} %" for name in protocols), "age"]
    whole = [row for row in rows if not row.damage]
    cells = [_cells(row, protocols) for row in whole]
    shown = [place for place in range(len(heads)) if place < 2 or any(line[place] for line in cells)]
    lines = [[line[place] for place in shown] for line in (heads, *cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = {row.path: _line(line, widths) for row, line in zip(whole, lines[1:], strict=True)}
    text |= {row.path: f"{row.path.ljust(widths[0])}  damaged: {row.damage}" for row in rows if row.damage}
    return "\n".join([_line(lines[0], widths), *(text[row.path] for row in rows)])


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        if any(sign in files or sign in folders for sign in _SIGNS):
            # A run holds no others but its former ones, and the rounds of prunings.
            folders[:] = [name for name in folders if Path(path, name, PRUNING).is_file()]
            yield Path(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _row(run_dir: Path, name: str) -> RunRow:
    try:
        status = status_of(run_dir, watch=False)
        last = last_row(run_dir) or {}
        return RunRow(
            name,
            state=status.state,
            step=status.step,
            steps=status.steps or None,
            epoch=_number(last, "epoch"),
            loss=_number(last, "loss"),
            images_per_s=_number(last, "images_per_s"),
            accuracies=headlines(run_dir),
            age_s=_age_s(run_dir),
        )
    except (InputError, OSError) as error:
        return RunRow(name, damage=line_of(error))


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None


def _age_s(run_dir: Path) -> float | None:
    times = [path.stat().st_mtime for name in (STATUS, METRICS) if (path := run_dir / name).exists()]
    return max(0.0, time.time() - max(times)) if times else None


def _cells(row: RunRow, protocols: list[str]) -> list[str]:
    step = "" if row.step is None else f"{row.step:,}"
    done = f"{row.step / row.steps:.0%}" if row.step is not None and row.steps else ""
    return [
        row.path,
        row.state,
        f"{step} of {row.steps:,}" if row.steps else step,
        done,
        "" if row.loss is None else f"{row.loss:.4f}",
        "" if row.images_per_s is None else f"{row.images_per_s:,.0f}",
        *(f"{row.accuracies[name]:.1f}" if name in row.accuracies else "" for name in protocols),
        "" if row.age_s is None else _short(row.age_s),
    ]


def _short(seconds: float) -> str:
    return f"{seconds / 86400:.0f} d" if seconds >= 2 * 86400 else format_seconds(seconds)


def _line(cells: list[str], widths: list[int]) -> str:
    """Words to the left, numbers to the right."""
    parts = [
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(parts).rstrip()
