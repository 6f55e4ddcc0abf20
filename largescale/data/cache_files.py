"""Files and locks of the shard cache, which the processes of a node share."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from shards.ground.pauses import pause

_LOCK_PAUSE_S = 0.05


class Held(NamedTuple):
    """A shard of a cache: where its tar is or will be, bytes, last use (modification time), and whether it is here."""

    tar: Path
    num_bytes: int
    touched: float
    here: bool


def held(folder: Path) -> list[Held]:
    """The shards in all folders of a cache. One on its way counts with the room taken for it.

    It takes room, then becomes a tar, then gives the room back; so rooms are listed first and tars last, and none is
    missed while it turns from one into the other.
    """
    found: dict[Path, Held] = {}
    for pattern in ("*/.*.room", "*/.*.part", "*/*.tar"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                facts, here = path.stat(), path.suffix == ".tar"
                tar = path if here else path.with_name(f"{path.stem[1:]}.tar")
                before = found[tar].num_bytes if tar in found else 0
                found[tar] = Held(tar, max(facts.st_size, before), facts.st_mtime, here)
    return list(found.values())


def part_of(tar: Path) -> Path:
    """Where a shard is assembled before it is complete."""
    return tar.with_name(f".{tar.stem}.part")


def room_of(tar: Path) -> Path:
    """The mark that room is taken for a shard: a sparse file of its length."""
    return tar.with_name(f".{tar.stem}.room")


def lock_of(tar: Path) -> Path:
    """Held by the one process of the node that fetches a shard."""
    return tar.with_name(f".{tar.stem}.lock")


def is_coming(tar: Path) -> bool:
    """Whether a process fetches a shard, or may: its lock may be one of another user."""
    with _unless_coming(tar) as is_over:
        return not is_over


def remove_left(path: Path, tar: Path) -> bool:
    """Remove the part or the room of a fetch that is over, as of a killed process; False if there is none, or a process
    fetches the shard.
    """
    with _unless_coming(tar) as is_over, suppress(FileNotFoundError):
        if is_over:
            path.unlink()
            return True
    return False


@contextmanager
def _unless_coming(tar: Path) -> Iterator[bool]:
    """Whether no process fetches a shard; if so, none begins meanwhile."""
    try:
        descriptor = os.open(lock_of(tar), os.O_RDWR)
    except OSError:  # no fetch has begun, or one of another user
        yield False
        return
    try:
        yield _is_locked(descriptor)
    finally:
        os.close(descriptor)


def recent(path: Path, seconds: float) -> str:
    """The text of a file that is at most `seconds` old; empty if there is none."""
    try:
        return path.read_text() if time.time() - path.stat().st_mtime < seconds else ""
    except FileNotFoundError:
        return ""


def write(path: Path, content: bytes) -> None:
    """Write a file that is whole as soon as it exists."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def disk_trouble(root: Path, error: OSError) -> str:
    """Why the cache cannot be written, in a line for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{root}: the disk of the shard cache is full; make room, lower data.cache_gb, or set data.cache to a "
            f"folder on a larger disk"
        )
    return f"{root}: the shard cache cannot be written ({error.strerror or error}); set data.cache to another folder"


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that only one process (or thread) of the node can hold; it ends with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not _is_locked(descriptor):
            pause(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)
