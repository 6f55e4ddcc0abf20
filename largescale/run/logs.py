"""What a run writes down as it goes: metrics, samples trained on, images it could not read, and bad steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch

from largescale.config import Config, flatten
from largescale.data.loaded import Batch
from largescale.methods.method import Output
from largescale.observe.metrics import JsonLines, MetricsLog
from largescale.observe.trackers import Tracker
from largescale.processes import rank
from shards.ground.errors import line_of
from shards.ground.files import atomic_write

_log = logging.getLogger(__name__)


class Logs:
    """The log files in a run's folder, each opened when it is first needed; every rank has one of these."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metrics: MetricsLog | None = None
        self._audit: JsonLines | None = None
        self._skipped: JsonLines | None = None
        self._supports: set[int | str] = set()

    def open(self, first_step: int, config: Config, unread: Iterable[int | str] = ()) -> None:
        """Open what is written in every run: metrics on rank 0, with data.audit the samples of every rank.

        Args:
            first_step: of this start.
            config: of the run.
            unread: with the unreadable supports that former starts have listed, as of `Meter`.
        """
        self._supports = set(unread)
        if rank() == 0:
            settings = flatten(config)
            trackers = [Tracker(name, self._path, config.name, settings) for name in dict.fromkeys(config.run.trackers)]
            self._metrics = MetricsLog(self._path, first_step, trackers)
        if config.data.audit:
            self._audit = JsonLines(self._path / "audit" / _name("jsonl"))

    def batch(self, step: int, batch: Batch) -> None:
        """Write what this rank trained on (with data.audit) and what it could not read; a support once, since it may
        be drawn in every step.
        """
        if self._audit is not None:
            row = {"step": step, "keys": batch.keys}
            self._audit.write(row | ({"support_keys": batch.support_keys} if batch.support_keys else {}))
        new = [row for support, row in batch.unread_supports.items() if support not in self._supports]
        self._supports |= batch.unread_supports.keys()
        self.skipped(step, [*batch.skipped, *new])

    def skipped(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write what this rank could not read, for a step or in the phase before it."""
        for row in rows:
            if self._skipped is None:
                self._skipped = JsonLines(self._path / "skipped" / _name("jsonl"))
            self._skipped.write({"step": step, **row})

    def metrics(self, row: dict[str, Any]) -> None:
        """Write one logged step, on rank 0."""
        if self._metrics is not None:
            self._metrics.write(row)

    def trouble(self, step: int, batch: Batch, output: Output, trouble: str) -> None:
        """Write what it takes to look into a bad step: keys and evidence of this rank. Views follow from the keys.

        A full disk costs only that: all ranks go on to say why the run stops, or to go back.
        """
        try:
            self._trouble(step, batch, output, trouble)
        except OSError as error:
            _log.warning("step %d: %s", step, line_of(error))

    def _trouble(self, step: int, batch: Batch, output: Output, trouble: str) -> None:
        folder = self._path / "trouble" / f"step-{step:08d}"
        keys = batch.keys or [str(sample_id) for sample_id in batch.ids.tolist()]
        row = {"step": step, "data_step": batch.step, "trouble": trouble, "loss": float(output.loss), "keys": keys}
        if batch.supports is not None:
            row["support_keys"] = batch.support_keys or [str(sample_id) for sample_id in batch.supports.ids.tolist()]
        write_text(folder / _name("json"), json.dumps(row) + "\n")
        evidence = {name: value.contiguous().cpu() for name, value in output.evidence.items()}
        with atomic_write(folder / _name("safetensors")) as file:
            file.write(safetensors.torch.save(evidence))

    @contextmanager
    def closed_after(self) -> Iterator[None]:
        """Close them however this block is left; a run that stops or fails waits less for its trackers."""
        try:
            yield
        except BaseException:
            try:
                self._close(whole=False)
            except OSError as error:  # must not hide why the run ends
                _log.warning("%s", line_of(error))
            raise
        self._close(whole=True)

    def _close(self, *, whole: bool) -> None:
        """Write what still waits, and close."""
        for lines in (self._audit, self._skipped):
            if lines is not None:
                lines.close()
        if self._metrics is not None:
            self._metrics.close(whole=whole)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically; with no text, remove it."""
    if not text:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as file:
        file.write(text.encode())


def _name(suffix: str) -> str:
    return f"rank-{rank():05d}.{suffix}"
