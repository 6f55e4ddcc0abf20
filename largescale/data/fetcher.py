"""Brings the shards of stores into the cache before they are read: the order is known, so nothing is guessed.

One process per rank fetches what the rank will read, next first, several shards at a time, as long as what it evicts
for them is needed later. It only saves time: a reader that finds a shard missing fetches it itself.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cached_property
from multiprocessing import util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from largescale.data.cache import FOREIGN, NEVER
from largescale.data.corpora import Corpus
from largescale.data.loader import Position
from largescale.data.order import Mixture, Uses
from largescale.data.reader import ShardReader
from largescale.distributed import stopping
from shards.ground.errors import InputError

_PAUSE_S = 0.2
_AFTER_FAILURE_S = 30.0
"""A shard that could not be fetched is retried after this time, unless its reader did so before."""

_RESTART_S = 10.0
"""Pause between restarts of a process that keeps dying."""

_TOUCH_S = 600.0
"""Other runs see so often that a shard is being read."""

_COUNTED = ("fetched_bytes", "evicted")
"""What a fetcher counts. Hits and misses are counted by the readers: did the shard arrive in time?"""

_log = logging.getLogger(__name__)


class Needs:
    """When this node reads which shard next, as of where the training stands.

    Args:
        order: of the samples.
        corpora: that it orders the samples of.
        streams: those that the ranks of this node read.
        position: of the training.

    Attributes:
        end: the data step at which the training ends: nothing is read from there on.
    """

    def __init__(self, order: Mixture, corpora: list[Corpus], streams: np.ndarray, position: Position) -> None:
        self._order, self._corpora, self._streams, self._position = order, corpora, streams, position
        self.end = NEVER
        self._uses: Uses | None = None
        self._epochs: list[int] = []
        self._step, self._next = -1, np.empty(0, np.int64)

    def upcoming(self, streams: np.ndarray) -> Uses:
        """Unfinished reads by these streams, sorted by first step, to the end of the run or of the next epoch."""
        step = self._position.get()
        epochs = [order.epoch(step) for order in self._order.orders]
        if self._uses is None or epochs != self._epochs:
            self._uses, self._epochs = self._order.uses(step), epochs
        return self._uses.of_streams(streams).between(step, self.end)

    def current(self, streams: np.ndarray) -> Uses:
        """Those under way."""
        step = self._position.get()
        return self.upcoming(streams).between(step, step + 1)

    def next_use(self, tar: Path) -> int:
        """The step at which this node reads a tar next, for whichever corpus: the current one if it is being read,
        NEVER if none; FOREIGN for one of no corpus.
        """
        step = self._position.get()
        if step != self._step:
            uses, tar_of_shard = self.upcoming(self._streams), tars_of(self._corpora)
            following = np.full(len(tar_of_shard), NEVER)
            np.minimum.at(following, tar_of_shard[uses.shard], np.maximum(uses.first_step, step))
            self._next, self._step = following, step
        number = self._numbers.get(tar)
        return FOREIGN if number is None else int(self._next[number])

    @cached_property
    def _numbers(self) -> dict[Path, int]:
        """The numbers of `tars_of`. Made in processes that ask, since a path takes some hundred bytes."""
        manifests = [corpus.manifest for corpus in self._corpora]
        tars = [manifest.tar_path(number) for manifest in manifests for number in range(len(manifest.shards))]
        return dict(zip(tars, tars_of(self._corpora).tolist(), strict=True))


class Fetcher:
    """The process that fetches for a rank.

    Args:
        corpora: what is read.
        needs: of this node.
        streams: that this rank reads.
        fetches: shards at a time.
    """

    def __init__(self, corpora: list[Corpus], needs: Needs, streams: np.ndarray, fetches: int) -> None:
        self._args = (corpora, needs, streams, fetches)
        self._counts = torch.zeros(len(_COUNTED), dtype=torch.int64).share_memory_()
        self._taken = [0] * len(_COUNTED)
        self._start()

    def attend(self) -> dict[str, int]:
        """Restart the process if it was killed; to be called from time to time.

        Returns:
            What it has counted since the last call.
        """
        if not self._process.is_alive() and time.monotonic() - self._started > _RESTART_S:
            code = self._process.exitcode or 0
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            _log.warning("the fetcher of shards (pid %d) %s; starting it again", self._process.pid, how)
            self._start()
        counts = self._counts.tolist()
        new = [count - taken for count, taken in zip(counts, self._taken, strict=True)]
        self._taken = counts
        return dict(zip(_COUNTED, new, strict=True))

    def close(self) -> None:
        """End the process; what it had half fetched stays for the next one."""
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_serve, args=(*self._args, self._counts), name="fetcher", daemon=True)
        with stopping.held():
            self._process.start()
        self._started = time.monotonic()
        util.Finalize(self, self._process.kill, exitpriority=10)


def _serve(corpora: list[Corpus], needs: Needs, streams: np.ndarray, fetches: int, counts: Tensor) -> None:
    stopping.live_and_die_with_parent()
    os.nice(5)  # decoding comes first
    reader = ShardReader(corpora, needs.next_use)
    reader.begin_in_process(lambda text: None)
    reader.take_counters()  # of the parent
    pool = ThreadPoolExecutor(fetches)
    coming: dict[Future[bool], int] = {}
    rests: dict[int, float] = {}
    full_until = touched = 0.0
    while True:
        uses = needs.upcoming(streams)
        now = time.monotonic()
        if now > touched + _TOUCH_S:
            touched = now
            for shard in needs.current(streams).shard.tolist():
                reader.touch(shard)
        shards = dict.fromkeys(uses.shard.tolist())
        wanted = (
            shard
            for shard in shards
            if rests.get(shard, 0) < now and shard not in coming.values() and not reader.is_present(shard)
        )
        # After one that did not fit no later one is tried: each try lists the cache, and could take the room it needs.
        while now >= full_until and len(coming) < fetches and (shard := next(wanted, None)) is not None:
            coming[pool.submit(reader.fetch_ahead, shard)] = shard
        done, _ = wait(coming, timeout=_PAUSE_S, return_when=FIRST_COMPLETED)
        for future in done:
            shard = coming.pop(future)
            try:
                if not future.result():
                    full_until = time.monotonic() + _PAUSE_S  # no room before others have been read
            except InputError as error:
                rests[shard] = time.monotonic() + _AFTER_FAILURE_S
                _log.debug("%s", error)
        if done:
            counted = reader.take_counters()
            counts += torch.tensor([counted[name] for name in _COUNTED])
        if not coming:
            time.sleep(_PAUSE_S)


def tars_of(corpora: list[Corpus]) -> np.ndarray:
    """A number for the tar of each shard, counted through the corpora: that of the first shard that is in it, since a
    folder may be listed several times, with other subsets.
    """
    first: dict[Path, int] = {}
    found, start = [], 0
    for corpus in corpora:
        num_shards = len(corpus.manifest.shards)
        found.append(first.setdefault(corpus.manifest.root, start) + np.arange(num_shards))
        start += num_shards
    return np.concatenate(found)


def working_set(order: Mixture, corpora: list[Corpus], streams: np.ndarray, ahead: int, step: int = 0) -> int:
    """Bytes of the shards in stores that these streams read at the same time, at most, up to `ahead` steps ahead, in
    each corpus's epoch at `step` and the next.
    """
    sizes = np.concatenate(
        [
            np.array([shard.num_bytes if corpus.cache is not None else 0 for shard in corpus.manifest.shards], np.int64)
            for corpus in corpora
        ]
    )
    uses = order.uses(step).of_streams(streams)
    return replace(uses, shard=tars_of(corpora)[uses.shard]).peak_bytes(sizes, ahead)
