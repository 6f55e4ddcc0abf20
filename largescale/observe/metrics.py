"""What a run records: metrics.jsonl, TensorBoard, audit and ledger of skipped samples; each step once, ever.

After a resume at step t, lines of steps from t on (written by a process that then died) are dropped, so a resumed
run's files equal those of one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from shards.files import atomic_write

METRICS = "metrics.jsonl"

_log = logging.getLogger(__name__)


class JsonLines:
    """A file of one JSON object a line, each written at once and flushed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one object."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsLog:
    """Writes the metrics of a run on rank 0: one object a logged step, the same scalars to TensorBoard."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._lines = JsonLines(run_dir / METRICS)
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step or None)

    def write(self, row: dict[str, Any]) -> None:
        """Record one logged step; `row` has `step` and scalars."""
        self._lines.write(row)
        for key, value in row.items():
            if key != "step":
                self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Close both."""
        self._lines.close()
        self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line that was cut by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            _log.warning("%s: dropped a line that a crash cut short", path)
    return rows


def forget_from(run_dir: Path, step: int) -> None:
    """Drop the lines of steps from `step` on in all of a run's JSON-lines files, before it continues there."""
    for path in [run_dir / METRICS, *run_dir.glob("audit/*.jsonl"), *run_dir.glob("skipped/*.jsonl")]:
        if path.exists():
            kept = [row for row in read_lines(path) if row["step"] < step]
            with atomic_write(path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
