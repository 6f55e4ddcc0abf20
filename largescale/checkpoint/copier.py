"""Copies published checkpoints to the mirror, behind the training and never in its way.

A thread of each rank goes through rounds: rank 0 compares the mirror with the run's folder and names what is missing,
every rank copies its part of the files, and rank 0 marks the copy whole. Every save starts a round, so what one round
missed is copied by the next; while the store is away, rounds are skipped for longer and longer. Every
request has a time limit, so a store that hangs ends a round like one that is away.
"""

from __future__ import annotations

import hashlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import cast

import torch.distributed as dist

from largescale.checkpoint.folder import PROGRESS, ROLLBACKS, Checkpoint, bytes_of, newest_first
from largescale.checkpoint.mirror import Mirror
from largescale.checkpoint.together import FailedOnARank, on_all, on_first
from shards.ground.errors import line_of

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 1800.0
"""Pause between tries while the store is away; doubled with each."""
_LAST_PAUSES_S = (0.0, 2.0, 10.0)
"""Pauses before the tries of a round that has to succeed."""


class Copier:
    """Keeps the mirror in step with the run's folder.

    Args:
        mirror: the copies.
        folder: the run's `checkpoints`.
        keep, keep_every: which copies are kept, as of `Saver`; whatever else is in the folder is kept there too.
        verify: raises if the folder belongs to another training by now; called on rank 0 before anything is removed.
        timeout: of its collectives; None uses that of torch.

    Collectives: every rank must make one; it makes a gloo group.
    """

    def __init__(
        self,
        mirror: Mirror,
        folder: Path,
        verify: Callable[[], None] = lambda: None,
        timeout: timedelta | None = None,
        *,
        keep: int,
        keep_every: int,
    ) -> None:
        self.mirror, self.folder, self._verify = mirror, folder, verify
        self._keep, self._keep_every = keep, keep_every
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))  # every rank is in it
        self._rounds: queue.SimpleQueue[tuple[bool, Future[str]]] = queue.SimpleQueue()
        self._last: Future[str] = Future()
        self._last.set_result("")
        self._thread: threading.Thread | None = None
        self._abandoned = False
        # On rank 0: marks of copies known to be whole, consecutive failures, and when to try again.
        self._whole: dict[str, bytes] = {}
        self._failures, self._next_try = 0, 0.0

    def begin(self, *, insist: bool = False) -> None:
        """Start a round after any earlier ones; with `insist` try at once, and repeatedly.

        Collectives: every rank must call it equally often; the thread then communicates on its own group.
        """
        self._last = Future()
        self._rounds.put((insist, self._last))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def wait(self, limit_s: float = math.inf, beat: Callable[[], None] = lambda: None) -> str:
        """Wait for all rounds; returns why the last one failed, empty if it did not.

        Args:
            limit_s: longest wait; without, the answer is the same on all ranks.
            beat: called every second, since a large checkpoint takes its time.
        """
        end = time.monotonic() + limit_s
        while not wait([self._last], max(0.0, min(1.0, end - time.monotonic()))).done:
            if time.monotonic() >= end:
                self._abandoned = True
                return f"not all is copied to {self.mirror.url} yet"
            beat()
        return self._last.result()

    def _work(self) -> None:
        while True:
            insist, outcome = self._rounds.get()
            try:
                outcome.set_result(self._round(insist))
            except BaseException as error:  # the group is broken, since a rank is gone or did not come in time
                complaint = f"checkpoint.mirror={self.mirror.url}: {line_of(error)}"
                if not self._abandoned:
                    _log.warning("%s; nothing more is copied until the run is started again", complaint)
                outcome.set_result(complaint)

    def _round(self, insist: bool) -> str:
        complaint = ""
        for pause_s in _LAST_PAUSES_S if insist else (0.0,):
            time.sleep(pause_s)
            try:
                names = on_first(self._group, partial(self._missing, insist))
                if names is None:
                    return complaint
                for name in names:
                    self._copy(self.folder / name)
                on_first(self._group, self._tidy)
            except FailedOnARank as error:
                complaint = f"checkpoint.mirror={self.mirror.url}: {error}"
            else:
                self._failures, self._next_try = 0, 0.0
                return ""
        if not insist:
            self._wait_longer(complaint)
        return complaint

    def _missing(self, insist: bool) -> list[str] | None:
        """Checkpoints that the mirror lacks, newest first; None if the round is skipped."""
        later = not self._rounds.empty() or time.monotonic() < self._next_try
        if later and not insist:
            return None
        here = newest_first(self.folder)
        there = set(self.mirror.steps())
        marks = {checkpoint.path.name: _marks(checkpoint) for checkpoint in here}
        for checkpoint in here:
            name = checkpoint.path.name
            if checkpoint.step not in there:
                self._whole.pop(name, None)
            elif self._whole.get(name) != marks[name] and self.mirror.holds(checkpoint):
                self._whole[name] = marks[name]
        return [name for name, mark in marks.items() if self._whole.get(name) != mark]

    def _copy(self, path: Path) -> None:
        """Copy one checkpoint, unless it is removed meanwhile, in which case newer ones are on their way."""
        checkpoint, lacks_files = on_first(self._group, lambda: self._begin(path))
        if checkpoint is None:
            return
        rank, size = dist.get_rank(), dist.get_world_size()
        try:
            if lacks_files:
                on_all(self._group, lambda: self.mirror.copy_files(checkpoint, rank, size))
            on_first(self._group, lambda: self._complete(checkpoint))
        except FailedOnARank:
            if on_first(self._group, path.exists):
                raise

    def _begin(self, path: Path) -> tuple[Checkpoint | None, bool]:
        """The checkpoint, None if it is gone, and whether its files are to be copied."""
        found = next((checkpoint for checkpoint in newest_first(self.folder) if checkpoint.path == path), None)
        if found is None:
            return None, False
        self._verify()
        return found, self.mirror.begin(found)

    def _complete(self, checkpoint: Checkpoint) -> None:
        mark = _marks(checkpoint)
        self.mirror.complete(checkpoint)
        self._whole[checkpoint.path.name] = mark
        _log.info("copied %s to %s", checkpoint.path.name, self.mirror.url)

    def _tidy(self) -> None:
        self._verify()
        # By the rule, not by what is here: a machine that took over has the newest alone.
        here = {checkpoint.step for checkpoint in newest_first(self.folder)}
        there = [step for step in self.mirror.steps() if step <= max(here, default=0)]
        newest = sorted({*here, *there}, reverse=True)[: self._keep]
        milestones = [step for step in there if self._keep_every and step % self._keep_every == 0]
        self.mirror.remove_but({*here, *newest, *milestones})

    def _wait_longer(self, complaint: str) -> None:
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._failures, 10))
        self._failures += 1
        self._next_try = time.monotonic() + pause_s
        if dist.get_rank() == 0:
            _log.warning(
                "%s; training continues, and its own checkpoints are whole. The first save after %d s tries "
                "again and copies what is missing",
                complaint,
                pause_s,
            )


def _marks(checkpoint: Checkpoint) -> bytes:
    """Distinguishes a checkpoint from any other of the same step, and from itself with other rollbacks."""
    digest = hashlib.sha256(checkpoint.path.name.encode())
    for name in (PROGRESS, ROLLBACKS):
        digest.update(b"\0" + (bytes_of(checkpoint.path / name) or b""))
    return digest.digest()
