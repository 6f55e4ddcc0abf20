"""`status.json` while a training runs: its state, the steps done and saved, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from largescale.processes import rank
from largescale.run.failures import told
from largescale.run.lease import Lease
from largescale.run.status import read_status, write_status
from shards.ground.errors import InputError


class StatusFile:
    """Writes `status.json`, as long as the folder is ours.

    Attributes:
        done: steps that are done.
    """

    def __init__(self, path: Path, lease: Lease) -> None:
        self.done = 0
        self._path, self._lease = path, lease
        self._state, self._num_steps = "", 0
        self._saved: int | None = None
        self._lock = threading.RLock()  # the saver's thread writes too

    def set(self, state: str, step: int, num_steps: int, *, reason: str = "") -> None:
        """Write, on rank 0: running, stopped, complete or not copied (and why), and the steps done."""
        if rank() == 0:
            self._write(state, step, num_steps, reason)

    def saved(self, step: int) -> None:
        """Note that a checkpoint is published. On every rank, from any thread."""
        with self._lock:
            self._saved = step
            if rank() == 0 and self._state == "running":
                with suppress(OSError):
                    self._write("running", self.done, self._num_steps)

    def resumed(self, step: int) -> None:
        """Note that the run continues from the checkpoint of this step."""
        self._saved = step

    @contextmanager
    def failure(self, first_step: int, num_steps: int) -> Iterator[None]:
        """Record in the file how and why the steps end; on any rank, since others may not know."""
        self.done = first_step

        def write(state: str, why: str) -> None:
            with suppress(OSError):  # what happened first must not be hidden
                self._write(state, self.done, num_steps, why)

        def state() -> str:
            with suppress(OSError, InputError):
                return (read_status(self._path) or {"state": ""})["state"]
            return ""

        with told(write, state):
            yield

    def _write(self, state: str, step: int, num_steps: int, reason: str = "") -> None:
        with self._lock:
            self._state, self._num_steps = state, num_steps
            if self._lease.still_ours():
                more = {"reason": reason} if reason else {}
                write_status(self._path, state, step, num_steps, saved=self._saved, **more)
