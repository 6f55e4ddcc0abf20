"""Names the rank that a run is waiting for when no step has ended for too long.

Each rank has a thread that tells the others where its training thread stands, through its own connection to the
ranks' store. When one has not moved for `timeout_s`, all of them write the stacks of their threads (on CUDA also the
record of NCCL's last collectives) to the run's folder `stacks/`, the lowest rank that answers says who is behind, and
all exit with 86; torchrun then restarts them (`--max-restarts`) from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from largescale.distributed import stopping
from largescale.distributed.bounded import TookTooLong, within
from largescale.distributed.launch import own_launch, start_id
from largescale.distributed.rendezvous import connect
from largescale.processes import rank, world_size

EXIT_CODE = 86
"""Exit code of a rank that left because the run hung."""

_ANSWER_S = 5.0
"""Time for all ranks to say where they stand."""
_WRITE_S = 5.0
"""Time to write stacks."""

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches the training thread, which creates it.

    Args:
        folder: where stacks go.
        timeout_s: time without a beat after which the run hangs; 0 watches nothing.

    Collectives: none; every rank should create one, and each talks to the store that torchrun or rank 0 keeps.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.folder, self.timeout_s = folder, timeout_s
        self._watched = threading.get_ident()
        self._closed = threading.Event()
        self.beat("start")
        self._thread: threading.Thread | None = None
        if timeout_s > 0:
            self._store = _own_connection(timeout_s)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, doing: str) -> None:
        """Note that the training thread moves, and what it does next."""
        self._doing, self._since = doing, time.monotonic()

    def close(self) -> None:
        """Stop watching, and end the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.timeout_s / 4)):
            late = time.monotonic() - self._since > self.timeout_s
            try:
                if late:
                    self._store.set("hangs", "1")
                elif not self._store.check(["hangs"]):
                    continue
            except dist.DistError:
                if not late:
                    continue  # the store's process is gone: collectives will fail, or this rank will be late
            try:
                self._report()
            finally:
                os._exit(EXIT_CODE)

    def _report(self) -> None:
        own = {
            "host": socket.gethostname(),
            "doing": self._doing,
            **position(self._watched),
            "still_s": time.monotonic() - self._since,
        }
        reports: list[dict[str, Any] | None] = [None] * world_size()
        reports[rank()] = own
        with suppress(dist.DistError):
            self._store.set(f"rank-{rank()}", json.dumps(own))
        stacks = self._stacks()
        with suppress(dist.DistError):
            time.sleep(_ANSWER_S)
            for other in range(world_size()):
                if self._store.check([f"rank-{other}"]):
                    reports[other] = json.loads(self._store.get(f"rank-{other}"))
        if next(r for r, report in enumerate(reports) if report) == rank():
            why = f"{blame(reports, self.timeout_s)}; {stacks}"
            sys.stderr.write(f"[rank {rank()}] error: {why}\n")
            sys.stderr.flush()
            stopping.say_last_words("failed", why)

    def _stacks(self) -> str:
        """Write them, and say where they are: that the disk is full, gone, or does not answer may be why it hangs."""
        try:
            within(_WRITE_S, self._write_stacks)
        except TookTooLong as late:
            return f"stacks could not be written to {self.folder} ({late})"
        except OSError as error:
            return f"stacks could not be written to {self.folder} ({error.strerror or error})"
        return f"stacks in {self.folder}"

    def _write_stacks(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{rank():05d}.txt").open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank()} on {socket.gethostname()}: {self._doing}\n")
            faulthandler.dump_traceback(file, all_threads=True)
        if torch.cuda.is_available():
            (self.folder / f"rank-{rank():05d}.nccl.json").write_bytes(_flight_record())


def position(thread: int) -> dict[str, Any]:
    """Where a thread of this process stands: its innermost line outside torch, and whether it waits for other ranks."""
    frame, place, waits = sys._current_frames().get(thread), "", False
    while frame is not None:
        path = frame.f_code.co_filename
        waits = waits or f"{os.sep}torch{os.sep}distributed{os.sep}" in path
        if not place and f"{os.sep}torch{os.sep}" not in path:
            place = f"{os.sep.join(path.split(os.sep)[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return {"place": place, "waits": waits}


def blame(reports: list[dict[str, Any] | None], timeout_s: float) -> str:
    """One line that names the ranks the others wait for.

    Args:
        reports: by rank: host, doing, place, waits; None for a rank that does not answer.
    """
    silent = [number for number, report in enumerate(reports) if report is None]
    busy = [number for number, report in enumerate(reports) if report and not report["waits"]]
    if silent:
        who = f"{_ranks(silent)} {_does(silent)} not answer (stopped, or its machine is gone)"
    elif busy and len(busy) < len(reports):
        who = "the others wait for " + "; ".join(_stands(number, reports[number]) for number in busy)
    else:
        who = "no rank is behind: " + "; ".join(_stands(number, report) for number, report in enumerate(reports[:4]))
    return f"no progress for {timeout_s:g} s: {who}"


def _stands(number: int, report: dict[str, Any] | None) -> str:
    assert report is not None
    return f"rank {number} on {report['host']} ({report['doing']}, {report['place']})"


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _does(numbers: list[int]) -> str:
    return "do" if len(numbers) > 1 else "does"


def _flight_record() -> bytes:
    """NCCL's record of the last collectives as JSON: what this rank has issued, and what has finished."""
    # Not a public function; recording is switched on in `process_group`.
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    return dump(includeCollectives=True, onlyActive=False) if dump is not None else b"{}"


def _own_connection(timeout_s: float) -> dist.Store:
    """A connection of the watchdog's own, since a thread that waits on a shared one would block it."""
    launch = own_launch()
    if launch is None:
        return dist.HashStore()
    return dist.PrefixStore(f"watchdog/{start_id()}", connect(launch, time.monotonic() + max(timeout_s, 30)))
