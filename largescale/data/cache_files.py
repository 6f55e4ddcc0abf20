"""Files of the shard cache, and locks, that the processes of a node share."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    """Tars of a cache, and those on their way: path, bytes, when they were last touched."""
    for pattern in ("*/*.tar", "*/.*.part"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                facts = path.stat()
                yield path, facts.st_size, facts.st_mtime


def recent(path: Path, seconds: float) -> str:
    """The text of a file that is not older than that; empty if there is none."""
    try:
        return path.read_text() if time.time() - path.stat().st_mtime < seconds else ""
    except FileNotFoundError:
        return ""


def write(path: Path, content: bytes) -> None:
    """Write a file that is whole as soon as it is there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def disk_trouble(root: Path, error: OSError) -> str:
    """Why the cache cannot be written, for its user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"{root}: the disk of the shard cache is full; make room, lower data.cache_gb, or set data.cache to a "
                f"folder on a larger disk")
    return f"{root}: the shard cache cannot be written ({error.strerror or error}); set data.cache to another folder"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process (or thread) of the node can hold; it ends with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
