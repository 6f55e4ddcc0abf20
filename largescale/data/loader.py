"""Loader processes that fill a ring of shared buffers, step after step.

Every process makes the same rows of every batch, using threads: reading, decoding and resizing release the
interpreter's lock. A batch is whole when each process has sent its part; that is all the coordination there is. The
ring is allocated once and, for a GPU, page-locked once.
"""

from __future__ import annotations

import errno
import logging
import mmap
import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch

from largescale.config import DataConfig, SoundConfig
from largescale.data.batches import Buffers, Part
from largescale.data.reader import ShardReader
from largescale.distributed import stopping
from largescale.distributed.out_of_memory import is_out_of_memory, line_of_memory, memory_for
from shards.ground.errors import InputError

_STATUS_BYTES = 256
CONDUCTORS = 2
"""Threads of a loader process besides those that decode: each sees to one batch."""

_LESS_LOADING = "lower data.workers, data.threads or data.prefetch, or data.max_pixels if images are that large"

_NO_SHM = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOSYS)

_log = logging.getLogger(__name__)


class LoaderDied(Exception):
    """A loader process died; the message says which and how."""


@contextmanager
def starting(key: str) -> Iterator[None]:
    """Wrap the start of processes whose number `key` sets.

    Raises:
        InputError: the system refuses to start them.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        what = (
            f"/dev/shm: {error.strerror}, which the locks of loader processes need; make it writable (containers: "
            f"--shm-size)"
            if error.errno in _NO_SHM
            else f"loader processes cannot be started ({error.strerror}); raise the limit (`ulimit -u`, `-n`)"
        )
        raise InputError(f"{what}, or set {key}=0") from error


class Shared:
    """Memory that a process shares with its forked children; anonymous, so it does not need room in /dev/shm."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(1, num_bytes))
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def pin(self) -> None:
        """Page-lock the memory, so that copies to a GPU overlap with its work."""
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(self.bytes.data_ptr(), self.bytes.numel(), 0))

    def unpin(self) -> None:
        """Unlock the memory again."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr()))


class StatusBoard:
    """What each loader process is doing, in words, for a process that waits for it."""

    def __init__(self, processes: int) -> None:
        self._rows = Shared(processes * _STATUS_BYTES).bytes.view(processes, _STATUS_BYTES)
        for process in range(processes):
            self.write(process, "starting")

    def write(self, process: int, text: str) -> None:
        """Set the words of a process."""
        line = text.encode()[: _STATUS_BYTES - 1].ljust(_STATUS_BYTES, b"\0")
        self._rows[process] = torch.frombuffer(bytearray(line), dtype=torch.uint8)

    def read(self, process: int) -> str:
        """The last words of a process."""
        return self._rows[process].numpy().tobytes().rstrip(b"\0").decode("utf-8", "replace")


class Position:
    """The data step that the training takes next, shared with all processes of this rank."""

    def __init__(self) -> None:
        self._value = Shared(8).bytes.view(torch.int64)

    def get(self) -> int:
        """The next data step."""
        return int(self._value[0])

    def set(self, step: int) -> None:
        """Set the next data step."""
        self._value[0] = step


class Maker(Protocol):
    """What makes batches, in any process: `batches.BatchMaker`, or `centre_crops.CentreCropMaker`.

    Attributes:
        reader: of the samples.
        data: whose crop groups the buffers have room for.
        places: as many as a batch has rows.
        facts, sound: for which the buffers have room, too.
    """

    reader: ShardReader
    data: DataConfig
    places: np.ndarray
    sound: SoundConfig | None

    @property
    def facts(self) -> Sequence[str]: ...

    def make(self, step: int, rows: slice, buffers: Buffers, threads: ThreadPoolExecutor | None) -> Part: ...


class Loader:
    """Batches of the given data steps, in order, from `processes` loader processes, or from this one if there are none.

    Args:
        maker: what makes them.
        steps: data steps.
        processes, threads: number of loader processes, and of threads in each.
        slots: batches that are made ahead.
        position: told the step that is taken.
        stall_s: a process that sends nothing for this long is named in the log.
        pin: page-lock the buffers.
        batch_key: the setting that decides how large a batch is, for messages.
    """

    def __init__(
        self,
        maker: Maker,
        steps: Iterable[int],
        *,
        processes: int,
        threads: int,
        slots: int,
        position: Position,
        stall_s: float,
        pin: bool,
        batch_key: str = "train.global_batch",
    ) -> None:
        self._maker, self._steps, self._position, self._stall_s = maker, iter(steps), position, stall_s
        batch = len(maker.places)
        room = maker.facts, maker.sound
        size = Buffers.num_bytes(maker.data, batch, *room)
        self._slots = slots + 1 if processes else 1  # one more, which the training holds
        with memory_for(
            f"for {self._slots} loaded batches of {size / 1e9:.2f} GB: lower data.prefetch={slots} or {batch_key}"
        ):
            self._memory, self._pinned = Shared(self._slots * size), pin
        self._ring = [
            Buffers.carve(self._memory.bytes[slot * size : (slot + 1) * size], maker.data, batch, *room)
            for slot in range(self._slots)
        ]
        self._taken = 0
        self._threads = ThreadPoolExecutor(threads) if threads > 1 and not processes else None
        self._processes: list[_LoaderProcess] = []
        if processes:
            board = StatusBoard(processes)
            bounds = np.linspace(0, batch, processes + 1).astype(int).tolist()
            with memory_for(f"for loader processes: lower data.workers={processes}"), starting("data.workers"):
                for number, (first, last) in enumerate(pairwise(bounds)):
                    work = _Work(number, maker, steps, self._ring, slice(first, last), threads, board)
                    self._processes.append(_LoaderProcess(work))
        if pin:  # after the processes are forked: page-locked memory need not be there in a child
            self._memory.pin()

    def take(self) -> tuple[int, Buffers, list[Part], int]:
        """The next batch, in buffers that are not reused before `release`.

        Returns:
            Its data step, buffers and parts in order, and how many more batches were ready.

        Raises:
            LoaderDied: a loader process ended.
        """
        step = next(self._steps)
        self._position.set(step)
        buffers = self._ring[self._taken % self._slots]
        if not self._processes:
            self._taken += 1
            with memory_for(_LESS_LOADING):
                return step, buffers, [self._maker.make(step, slice(None), buffers, self._threads)], 0
        parts = [process.part(self._taken, self._stall_s) for process in self._processes]
        self._taken += 1
        return step, buffers, parts, min(process.ready(self._taken) for process in self._processes)

    def ready(self) -> bool:
        """Whether the next batch is there."""
        return bool(self._processes) and all(process.ready(self._taken) > 0 for process in self._processes)

    def release(self) -> None:
        """Give back the buffers of the oldest batch still taken."""
        for process in self._processes:
            process.free_slots.release()

    def close(self) -> None:
        """End the loader processes."""
        for process in self._processes:
            process.close()
        if self._threads is not None:
            self._threads.shutdown()
        if self._pinned:
            self._memory.unpin()


@dataclass(frozen=True)
class _Work:
    """What one loader process does.

    Attributes:
        number: of the process.
        maker: what makes batches.
        steps: data steps, of which it makes a part each.
        ring: buffers, which all processes share.
        rows: its part of every batch.
        num_threads: that decode.
        board: told what it is doing.
    """

    number: int
    maker: Maker
    steps: Iterable[int]
    ring: list[Buffers]
    rows: slice
    num_threads: int
    board: StatusBoard

    def says(self, text: str) -> None:
        """Put on the board what it is doing."""
        self.board.write(self.number, text)


class _LoaderProcess:
    """One loader process, seen from the training process."""

    def __init__(self, work: _Work) -> None:
        # A fork starts in milliseconds, while a fresh interpreter needs seconds to import torch; the child touches no
        # CUDA, no collective, and no thread of its parent.
        context = multiprocessing.get_context("fork")
        self.number, self._board = work.number, work.board
        self.free_slots = context.Semaphore(len(work.ring))
        self._connection, sender = context.Pipe(duplex=False)
        self._received: deque[Part] = deque()
        self._first, self._ended = 0, False
        self._process = context.Process(
            target=_serve, args=(work, self.free_slots, sender), name=f"loader {work.number}", daemon=True
        )
        with stopping.held():
            self._process.start()
        sender.close()
        # In case `close` is never called: it ignores the signal that multiprocessing ends its children with.
        util.Finalize(self, self._process.kill, exitpriority=10)

    def part(self, number: int, stall_s: float) -> Part:
        """This process's part of batch `number`; batches are asked for in order."""
        waited = said = 0.0
        began = time.monotonic()
        while not self.ready(number):
            if self._ended:
                raise LoaderDied(self._epitaph())
            stopping.leave_without_data(began)
            if wait([self._connection], min(1.0, stall_s)):
                continue
            waited += min(1.0, stall_s)
            if waited < said + stall_s:
                continue
            said = waited
            _log.warning("waiting for %s for %.0f s; it was last %s", self._name, waited, self._board.read(self.number))
        self._first += 1
        return self._received.popleft()

    def ready(self, number: int) -> int:
        """How many parts from batch `number` on have arrived."""
        while not self._ended and self._connection.poll():
            try:
                self._received.append(self._connection.recv())
            except EOFError:
                self._ended = True
        return max(0, self._first + len(self._received) - number)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    @property
    def _name(self) -> str:
        return f"loader process {self.number} (pid {self._process.pid})"

    def _epitaph(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{self._name} {how}, last {self._board.read(self.number)}{self._why(-code)}"

    def _why(self, number: int) -> str:
        if number == signal.SIGKILL:
            return f"; out of memory? {_LESS_LOADING}"
        return ""


def _serve(work: _Work, free_slots: Any, sender: Connection) -> None:
    """The life of a loader process."""
    stopping.live_and_die_with_parent()
    try:
        _load(work, free_slots, sender)
    except Exception as error:
        sender.send(_failed(work.number, error))


def _failed(number: int, error: Exception) -> Part:
    if is_out_of_memory(error):
        return Part(no_memory=line_of_memory(error, f"in loader process {number}: {_LESS_LOADING}"))
    if isinstance(error, InputError):
        return Part(error=str(error))
    return Part(bug=f"loader process {number}:\n{''.join(traceback.format_exception(error))}")


def _load(work: _Work, free_slots: Any, sender: Connection) -> None:
    """Make two batches at a time, so that no thread waits for the last image of one."""
    torch.set_num_threads(1)
    work.maker.reader.begin_in_process(work.says)
    threads = ThreadPoolExecutor(work.num_threads)
    conductors = ThreadPoolExecutor(CONDUCTORS)
    making: deque[Future[Part]] = deque()

    def make(count: int, step: int) -> Part:
        try:
            part = work.maker.make(step, work.rows, work.ring[count % len(work.ring)], threads)
        except Exception as error:
            part = _failed(work.number, error)
        work.says(f"done with its part of data step {step}")
        return part

    for count, step in enumerate(work.steps):
        while not free_slots.acquire(timeout=0.02 if making else None):
            while making and making[0].done():
                sender.send(making.popleft().result())
        making.append(conductors.submit(make, count, step))
        while len(making) > 1 or (making and making[0].done()):
            sender.send(making.popleft().result())
    while making:
        sender.send(making.popleft().result())
