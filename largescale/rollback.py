"""Going back: after a step that cannot be used, on from the last checkpoint without the data that led there.

Step t of a run uses data step t of the stream, plus as many as were left out before it. Windows that were left out are
kept in the run's `rollbacks.jsonl`, so that every later start of the run leaves out the same.

Source: PaLM (arXiv 2204.02311, section 5.1) restarts before a spike and leaves out the batches around it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from largescale.observe.metrics import read_lines
from shards.files import atomic_write

FILE = "rollbacks.jsonl"


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
        for first, end in [*self.windows, (math.inf, math.inf)]:
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
        self._path = run_dir / FILE

    def rows(self) -> list[dict[str, object]]:
        """All of them, oldest first."""
        return read_lines(self._path) if self._path.exists() else []

    def windows(self) -> list[tuple[int, int]]:
        """Data steps that are left out."""
        return [(int(first), int(end)) for first, end in (row["without"] for row in self.rows())]

    def record(self, *, step: int, to: int, data_step: int, window: int, why: str) -> None:
        """Add one: `window` data steps up to and including `data_step` are left out from now on.

        Those that the checkpoint was trained on stay in: the window begins at the checkpoint or later.
        """
        kept = next(iter(DataSteps(to, to + 1, self.windows())))
        row = {"step": step, "to": to, "without": [max(kept, data_step - window + 1), data_step + 1], "why": why}
        with atomic_write(self._path) as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in [*self.rows(), row]).encode())
