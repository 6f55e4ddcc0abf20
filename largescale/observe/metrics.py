"""What a run records: metrics.jsonl, TensorBoard, audit and ledger of skipped samples; each step exactly once.

After a resume at step t, lines of steps from t on (written by a process that then died) are dropped, so a resumed
run's files equal those of one that was never interrupted.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from largescale.observe.records import Records
from largescale.observe.trackers import Tracker
from shards.ground.files import atomic_write

METRICS = "metrics.jsonl"

_TAIL_BYTES = 65536

_log = logging.getLogger(__name__)


class JsonLines:
    """A file with one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self._records = Records(path)

    def write(self, row: dict[str, Any]) -> None:
        """Append one object as a line."""
        self._records.append(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._records.close()


class Board:
    """Scalars in TensorBoard's files. TensorBoard's own writer has a thread whose failures cannot be handled.

    Args:
        folder: of the files; each start of a run adds one.
        first_step: steps from there on that earlier files have are not shown.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._records = Records(folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}")
        self._append(Event(file_version="brain.Event:2"))
        if first_step:
            self._append(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add the scalars of one step."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._records.append(record.getvalue())


class MetricsLog:
    """Writes the metrics of a run on rank 0: one object per logged step, the same scalars to TensorBoard and trackers.

    Args:
        run_dir: folder of the run.
        first_step: of this start.
        trackers: what gets the same scalars besides; nothing that happens there matters here.
    """

    def __init__(self, run_dir: Path, first_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._lines = JsonLines(run_dir / METRICS)
        self._board = Board(run_dir / "tensorboard", first_step)
        self._trackers = trackers

    def write(self, row: dict[str, Any]) -> None:
        """Record one logged step; `row` has `step` and scalars."""
        self._lines.write(row)
        scalars = {key: value for key, value in row.items() if key != "step"}
        self._board.write(row["step"], scalars)
        for tracker in self._trackers:
            tracker.write(row["step"], scalars)

    def close(self, *, whole: bool = True) -> None:
        """Close the log and the TensorBoard file, and wait a little for trackers; less if the run is not at its end."""
        try:
            self._lines.close()
            self._board.close()
        finally:
            for tracker in self._trackers:
                tracker.close(whole=whole)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole records of a JSON-lines file; a line that was cut by a crash, or is not a record, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            row["step"] + 0
            rows.append(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            _log.warning("%s: dropped a line that was cut short by a crash or is not a record of a step", path)
    return rows


def last_row(run_dir: Path) -> dict[str, Any] | None:
    """The last whole record of a run's metrics, read from the end of the file; None if there is none."""
    with suppress(OSError), (run_dir / METRICS).open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # cut at either end
                row = json.loads(line)
                row["step"] + 0
                return row
    return None


def forget_from(run_dir: Path, step: int) -> None:
    """Drop lines for steps from `step` on in all of a run's JSON-lines files, before the run continues there."""
    for path in [run_dir / METRICS, *run_dir.glob("audit/*.jsonl"), *run_dir.glob("skipped/*.jsonl")]:
        if path.exists():
            kept = [row for row in read_lines(path) if row["step"] < step]
            with atomic_write(path) as file:
                file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
