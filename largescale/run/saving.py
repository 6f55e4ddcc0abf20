"""When a run's checkpoints are saved, what a failed save means, and how copies get to the mirror.

The life of one save, and what the loop (pretrain.py) must not do in between:

    idle --save--> staging ----wait_staged----> writing ----------> published ----------> copied
     ^               |                             |                    |                   (checkpoint.mirror)
     |               | forward and backward go on, | updates go on,     | `latest` names it, old ones are removed
     |               | weights must not change     | no other save      |
     |               v                             v                    v
     +------- settle: before the next save, before going back, at the end; failed saves are counted here

- `save` returns once what a forward pass changes (BatchNorm's statistics, queues, teachers' buffers) is copied: the
  next forward may begin. Weights and optimizer state are copied behind it.
- `wait_staged` comes before the next update. Without it the copy would mix weights of two steps.
- `settle` comes before a run goes back to a checkpoint: all ranks must agree on which is the newest, and one that is
  half published would exist for some and not for others.
- A thread writes and publishes (checkpoint/saver.py), with exchanges on a process group of its own, so that they never
  meet those of the training. Before it publishes it asks the lease whether the folder is still ours.
- A failed save leaves earlier checkpoints as they were. It costs a warning, from the thread, the next one is tried, and
  after MAX_FAILED_SAVES in a row the run stops: it would compute for nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint.copier import Copier
from largescale.checkpoint.mirror import Mirror
from largescale.checkpoint.saver import SaveFailed, Saver
from largescale.config import CheckpointConfig
from largescale.parallel.engine import Engine
from largescale.run.advice import after_failed_saves
from largescale.run.failures import TrainingStopped
from largescale.run.lease import Lease

_log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Saves that fail in a row before the run stops."""


class Saving:
    """Saves and copies the checkpoints of a run.

    Args:
        config: when to save, and what to keep.
        checkpoints: the folder of checkpoints.
        lease: of the run's folder.
        device: of the tensors to save.
        mirror: where copies go; None for no copies.
        published: called with the step on every rank once its checkpoint is published, in the saver's thread.
        timeout: of collectives; None uses that of torch.

    Collectives: every rank must make one; it makes gloo groups.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        checkpoints: Path,
        *,
        lease: Lease,
        device: torch.device,
        mirror: Mirror | None,
        published: Callable[[int], None],
        timeout: timedelta | None = None,
    ) -> None:
        self._checkpoints, self._lease, self._told = checkpoints, lease, published
        self._saver = Saver(
            checkpoints,
            keep=config.keep,
            keep_every=config.keep_every,
            background=config.background,
            device=device,
            owner=lease.number,
            verify=lease.verify,
            published=self._published,
            timeout=timeout,
        )
        self._copier = None
        if mirror is not None:
            kept = {"keep": config.keep, "keep_every": config.keep_every}
            self._copier = Copier(mirror, checkpoints, lease.verify, timeout, **kept)
        self._failed, self._why_failed, self._seconds = 0, "", 0.0

    def save(self, engine: Engine, progress: dict[str, Any], *, final: bool) -> None:
        """Begin to save a checkpoint; with `final` also end it.

        Args:
            engine: whose state is saved.
            progress: JSON values that go with it, `step` among them.
            final: there will be no other save.

        Raises:
            TrainingStopped: the save failed with `final`, or as the last of MAX_FAILED_SAVES in a row.

        Collectives: every rank must call it; those of the state and of the saver.
        """
        with self._counted():
            self.settle()
            self._lease.check()
            state = engine.state()
            try:
                self._saver.save(state, progress, until_update=engine.until_update(state))
            except SaveFailed as error:
                self._count_failure(error, final)
            if final:
                self.settle(final=True)

    def wait_staged(self) -> None:
        """Return when weights may change: the save under way, if any, has its copy of them."""
        with self._counted():
            self._saver.wait_staged()

    def take_seconds(self) -> float:
        """Seconds that training has waited for saves since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def settle(self, *, final: bool = False) -> None:
        """Return when what is being saved is published, or has failed; with `final` the last save must be published.

        Raises:
            TrainingStopped: as `save`.

        Collectives: none.
        """
        try:
            self._saver.wait()
        except SaveFailed as error:
            self._count_failure(error, final)
        if final and self._failed:
            raise TrainingStopped(self._why_failed)

    @property
    def has_mirror(self) -> bool:
        """Whether checkpoints are copied."""
        return self._copier is not None

    def begin_copies(self) -> None:
        """Begin to copy what the mirror lacks; returns at once."""
        if self._copier is not None:
            self._copier.begin()

    def insist_on_copies(self, beat: Callable[[], None] = lambda: None) -> str:
        """Copy what is missing, and return when that has ended, with what went wrong.

        Args:
            beat: called while it lasts.

        Collectives: the copier's; every rank must call it.
        """
        if self._copier is None:
            return ""
        self._copier.begin(insist=True)
        return self._copier.wait(beat=beat)

    def wait_copies(self, limit_s: float) -> None:
        """Give what is being copied some time."""
        if self._copier is not None and (complaint := self._copier.wait(limit_s)):
            _log.warning("%s; the next start makes up for that", complaint)

    def linger(self, limit_s: float) -> None:
        """Give a save under way some time to be published, though this run ends with an error. Raises nothing."""
        self._saver.linger(limit_s)

    def _published(self, step: int) -> None:
        self._failed = 0  # only here: that nothing is under way says nothing of the last save
        self._told(step)
        self.begin_copies()

    def _count_failure(self, error: SaveFailed, final: bool) -> None:
        self._lease.check()  # a save may have failed because the folder is another training's
        self._failed += 1
        line = f"{self._checkpoints}: could not save: {error}. Earlier checkpoints are as they were"
        self._why_failed = f"{line}; {after_failed_saves(str(error))}"
        if final or self._failed == MAX_FAILED_SAVES:
            raise TrainingStopped(self._why_failed) from error
