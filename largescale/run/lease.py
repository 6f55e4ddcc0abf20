"""One training per folder: its owner renews a lease, and others take the folder only where it no longer does.

Numbers only grow while a folder is owned: a process that takes it over creates the next `owner-N.json`, which the file
system lets exactly one process do, on network file systems too. The former owner, if still alive, finds the higher
number at its next renewal or before its next save, and stops. Only rank 0 of a training has a lease.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from largescale.config import Config
from largescale.distributed import stopping
from largescale.processes import on_rank_0
from largescale.run.failures import TrainingStopped
from largescale.run.owner import (
    Owner,
    newest_owner,
    owner_numbers,
    owner_path,
    parse_owner,
    process_start,
    this_machine,
)
from shards.ground.errors import InputError
from shards.ground.files import naming

_log = logging.getLogger(__name__)

_UNREADABLE_LEASE_S = 30.0
"""Lease of an owner whose file cannot be read: it died, or is writing it right now."""
_RENEWALS = 10
"""Renewals within the time of a lease."""


class FolderLost(TrainingStopped):
    """Another training has taken the folder; nothing more may be written there."""


class Lease:
    """A folder that belongs to this training. On rank 0 a thread renews the lease; other ranks only know its number.

    Attributes:
        number: of the owner's file; higher with every owner.
        step: steps done, for `largescale status`.
    """

    def __init__(self, run_dir: Path, number: int, owner: Owner) -> None:
        self.run_dir, self.number, self.step = run_dir, number, owner.step
        self._owner, self._lost, self._renewed = owner, "", _clock()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread that renews the lease."""
        self._thread = threading.Thread(target=self._renew_until_the_end, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Return if the folder may be written to. Costs a look at the clock, and a renewal after a long pause.

        Raises:
            FolderLost: another training has it.
        """
        if self._thread is not None:
            # This process may have been suspended for long: the first thing it does on waking must not be a write.
            if _clock() - self._renewed > self._owner.lease_s / 2:
                self.renew()
            self._complain()

    def verify(self) -> None:
        """Return if the folder itself says that it belongs to this training.

        Raises:
            FolderLost: another training has it.
        """
        if self._thread is not None:
            self.renew()
            self._complain()

    def still_ours(self) -> bool:
        """Whether the folder belongs to this training, or to none; on any rank."""
        found = newest_owner(self.run_dir)
        return found is None or found[0] < self.number or self._is_own(found[1])

    def renew(self) -> None:
        """Show that this owner is alive, or notice that it lost the folder. A full or absent disk means neither."""
        with self._lock, suppress(OSError):
            if self._lost or not self.run_dir.is_dir():
                return
            if any(number > self.number for number in owner_numbers(self.run_dir)):
                self._lost = f"it now belongs to {_name_of(self.run_dir)}"
                return
            try:
                # Never created here: a file that was removed must not come back.
                descriptor = os.open(owner_path(self.run_dir, self.number), os.O_RDWR)
            except FileNotFoundError:
                self._lost = "the file that made it ours is gone"
                return
            try:
                if not self._is_own(os.pread(descriptor, 4096, 0)):
                    self._lost = f"it now belongs to {_name_of(self.run_dir)}"
                    return
                self._owner = replace(self._owner, renewals=self._owner.renewals + 1, time=time.time(), step=self.step)
                os.pwrite(descriptor, self._owner.to_bytes(), 0)
            finally:
                os.close(descriptor)
            self._renewed = _clock()

    def release(self) -> None:
        """Give up the folder, and remove it if it is empty."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._owner.lease_s)  # a renewal may hang with its disk
            with suppress(OSError):
                path = owner_path(self.run_dir, self.number)
                if self._is_own(path.read_bytes()):
                    path.unlink()
                self.run_dir.rmdir()

    def _renew_until_the_end(self) -> None:
        while not self._ended.wait(self._owner.lease_s / _RENEWALS):
            self.renew()

    def _is_own(self, content: bytes) -> bool:
        # A renewal torn by a machine crash does not mean another owner.
        owner = parse_owner(content)
        return owner is None or owner.token == self._owner.token

    def _complain(self) -> None:
        if self._lost:
            raise FolderLost(f"{self.run_dir}: {self._lost}; this training stops and writes nothing more to it")


@contextmanager
def lease_of(config: Config) -> Iterator[Lease]:
    """Own the run's folder while the block runs.

    Raises:
        InputError: another training owns it, and still did after `run.owner_wait_s`.
        StoppedWaiting: a signal asked to stop meanwhile.

    Collectives: every rank must call it; a broadcast of an object.
    """
    run_dir = Path(config.run.dir)
    leases: list[Lease] = []

    def take() -> tuple[int, Owner]:
        leases.append(take_folder(run_dir, lease_s=config.run.lease_s, wait_s=config.run.owner_wait_s))
        return leases[0].number, leases[0]._owner

    taken = on_rank_0(take)
    lease = leases[0] if leases else Lease(run_dir, *taken)
    try:
        yield lease
    finally:
        lease.release()


def take_folder(run_dir: Path, *, lease_s: float, wait_s: float) -> Lease:
    """Become the owner of a folder, created if needed, in this process.

    An owner that does not renew its lease is watched for the duration of the lease, by this process's own clock.

    Args:
        lease_s: without a renewal for this long, others may take the folder from this process.
        wait_s: how long to wait for an owner that is alive.

    Raises:
        InputError: its owner is alive; names host, process and start time.
        StoppedWaiting: a signal asked to stop while that was waited for.
    """
    started = watched_since = time.monotonic()
    watched: tuple[int, bytes] | None = None
    lives = False
    while True:
        found = newest_owner(run_dir)
        owner = parse_owner(found[1]) if found else None
        if found != watched:
            # The same owner's file has changed before our eyes.
            lives = found is not None and watched is not None and found[0] == watched[0]
            watched, watched_since = found, time.monotonic()
            if found and not lives:
                _log.info("%s belongs to %s; checking whether it is alive", run_dir, owner or "an unknown owner")
        silent_s = time.monotonic() - watched_since
        if found is None or (owner and owner.is_dead()) or silent_s > _lease_s(owner):
            lease = _claim(run_dir, found[0] + 1 if found else 1, lease_s)
            if lease is not None:
                if found:
                    why = "its process is gone" if silent_s <= _lease_s(owner) else f"silent for {silent_s:.0f} s"
                    _log.warning("%s: taken over from %s (%s)", run_dir, owner or "an unknown owner", why)
                return lease
            continue
        if lives and time.monotonic() - started >= wait_s:
            raise InputError(
                f"{run_dir}: {owner or 'another training'} is training there; wait for it to end, stop it, or use "
                f"another run.dir (run.owner_wait_s sets how long to wait)"
            )
        stopping.leave_if_asked(f"waiting for {owner or 'the owner'} to leave {run_dir}")
        time.sleep(min(0.2, _lease_s(owner) / 20))


def _claim(run_dir: Path, number: int, lease_s: float) -> Lease | None:
    """Create an owner's file; None if another process was faster."""
    pid = os.getpid()
    owner = Owner(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=this_machine(),
        pid=pid,
        process_start=process_start(pid),
        job=os.environ.get("SLURM_JOB_ID", ""),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        lease_s=lease_s,
        time=time.time(),
    )
    path = owner_path(run_dir, number)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except (FileExistsError, FileNotFoundError):  # or a former owner has just removed the empty folder
        return None
    try:
        with naming(path):
            os.write(descriptor, owner.to_bytes())
            os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    # A process with an outdated list of the folder may have created a lower number than a new owner's.
    numbers = owner_numbers(run_dir)
    if numbers[:1] != [number]:
        path.unlink(missing_ok=True)
        return None
    for former in numbers[1:]:
        owner_path(run_dir, former).unlink(missing_ok=True)
    lease = Lease(run_dir, number, owner)
    lease.start()
    return lease


def _lease_s(owner: Owner | None) -> float:
    return owner.lease_s if owner else _UNREADABLE_LEASE_S


def _name_of(run_dir: Path) -> str:
    found = newest_owner(run_dir)
    return str((found and parse_owner(found[1])) or "another training")


def _clock() -> float:
    """Seconds on a clock that also runs while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
