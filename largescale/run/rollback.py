"""Going back: after an unusable step, continue from the last checkpoint without the data that led there.

Step t of a run uses data step t of the stream plus the number of steps left out before it. Windows left out are
kept in the run's `rollbacks.jsonl`, in every later checkpoint, and beside the checkpoint that the run went back to: so
every later start leaves out the same, even one that only has a checkpoint from the mirror.

Source: PaLM (arXiv 2204.02311, section 5.1) restarts before a spike and leaves out the batches around it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from largescale.checkpoint.folder import ROLLBACKS, Checkpoint
from largescale.processes import from_rank_0, rank
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

_log = logging.getLogger(__name__)


class DataSteps:
    """The data steps of the steps from `first_step` to `num_steps`, in order, without those in the windows.

    Args:
        windows: pairs [first, end) of data steps that are left out.
    """

    def __init__(self, first_step: int, num_steps: int, windows: Sequence[tuple[int, int]] = ()) -> None:
        self.first_step, self.num_steps, self.windows = first_step, num_steps, sorted(windows)

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first_step)

    def __iter__(self) -> Iterator[int]:
        step, data_step = 0, 0
        for first, end in [*self.windows, (sys.maxsize, sys.maxsize)]:
            # Steps before this window, those before first_step passed over at once.
            ahead = min(max(0, self.first_step - step), max(0, first - data_step))
            step, data_step = step + ahead, data_step + ahead
            while data_step < first and step < self.num_steps:
                if step >= self.first_step:
                    yield data_step
                step, data_step = step + 1, data_step + 1
            data_step = max(data_step, end)


class Rollbacks:
    """What a run has gone back for, as its folder records it: step, checkpoint it went back to, window, why."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ROLLBACKS

    def rows(self) -> list[dict[str, Any]]:
        """All rollbacks, oldest first, as this rank sees them: another node's file system may show new ones late."""
        return _read(self._path)

    def number(self) -> int:
        """How many there are, on all ranks alike. Collectives: one broadcast."""
        return from_rank_0(len(self.rows()) if rank() == 0 else 0)

    def windows(self) -> list[tuple[int, int]]:
        """Windows of data steps that are left out, on all ranks alike. Collectives: one broadcast."""
        return from_rank_0(_windows(self.rows()) if rank() == 0 else [])

    def record(self, checkpoint: Checkpoint, *, step: int, data_step: int, window: int, why: str) -> None:
        """Add one, on rank 0: `window` data steps up to and including `data_step` are left out from now on.

        Those that the checkpoint was trained on stay in: the window begins at the checkpoint or later. It is written
        into the checkpoint's folder first, so that any run that continues from there leaves out the same data.
        """
        to = checkpoint.step
        kept = next(iter(DataSteps(to, to + 1, _windows(self.rows()))))
        row = {"step": step, "to": to, "without": [max(kept, data_step - window + 1), data_step + 1], "why": why}
        rows = [*self.rows(), row]
        _write(checkpoint.path / ROLLBACKS, rows)
        _write(self._path, rows)

    def settle(self, checkpoint: Checkpoint) -> None:
        """Adopt on rank 0 what a checkpoint says, before the run continues from there.

        What the folder recorded beyond that is kept: the run went back after the checkpoint was saved. A folder that
        says something else has the rows of another history, or has lost its own.

        Raises:
            InputError: a file is not a record of rollbacks.
        """
        rows = rows_of(checkpoint)
        if (own := self.rows())[: len(rows)] != rows:
            if own[: len(rows)] != rows[: len(own)]:
                _log.warning("%s: disagrees with %s, which takes precedence", self._path, checkpoint.path)
            _write(self._path, rows)


def rows_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What a run that continues from a checkpoint has gone back for before.

    Raises:
        InputError: the file beside it is not a record of rollbacks.
    """
    inside = checkpoint.path / ROLLBACKS
    return _read(inside) if inside.exists() else list(checkpoint.progress.get("rollbacks", []))


def _windows(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(int(first), int(end)) for first, end in (row["without"] for row in rows)]


def _read(path: Path) -> list[dict[str, Any]]:
    """All rows. The file is always written whole, and it decides the data: nothing in it may be ignored."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            first, end = row["without"]
            whole = 0 <= int(first) < int(end)
        except (KeyError, TypeError, ValueError, RecursionError):
            whole = False
        if not whole:
            raise InputError(f"{path}: {line[:80]} is not a record of a rollback; restore the file")
        rows.append(row)
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
