"""Files that are either whole or absent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards.ground.errors import InputError


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is whole, and `durable`: on the disk.

    It is written under a temporary name in the same folder, which is made if needed; a failure removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on different hosts, or in different containers, may have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.writing")
    try:
        with naming(path, instead_of=temporary):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


@contextmanager
def naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Give errors of the system the name of the file, or folder, that is being written.

    An error in the middle of a file does not know its name, and a temporary name, `instead_of`, would help no one.
    """
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or (instead_of is not None and str(error.filename) == str(instead_of))
        if unnamed and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted; none where there is no such folder.

    Raises:
        OSError: the folder cannot be read, which `Path.glob` would pass over as if it were empty.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_even_if_full(path: Path, text: str) -> None:
    """Replace a small file; where the disk has no room for a second one, write over the one that is there.

    It must fit into one block of the disk, which it has already; a crash just then could tear it.
    """
    content = text.encode()
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        if error.errno not in NO_ROOM or not path.is_file():
            raise
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)


@contextmanager
def at_work_in(folder: Path, *, with_others: bool) -> Iterator[None]:
    """Mark a folder as being written to, for as long as this process lives; nothing is left in it.

    Args:
        folder: made if needed.
        with_others: whether other processes may write there too, if they pass this as well.

    Raises:
        InputError: another process is at work there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if with_others else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{folder}: another command is writing to it; wait for it to end, or stop it") from error
    except OSError:
        pass  # some network file systems lock no folders
    try:
        yield
    finally:
        os.close(descriptor)


def begin_write_out(file: BinaryIO, start: int, size: int) -> None:
    """Have the kernel send a stretch of a file to the disk while we go on, so that fsync has little left to wait for.

    Only Linux can be asked to; elsewhere, and where it declines, all is left to fsync.
    """
    if _SYNC_FILE_RANGE is not None:
        file.flush()
        _SYNC_FILE_RANGE(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(size), _WRITE)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit that is full."""

_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of <fcntl.h>


def remove_partial_files(folder: Path) -> None:
    """Remove what `atomic_write` left in a folder when its process was killed; no other process may write there."""
    for partial in folder.glob(".*.writing"):
        if not partial.is_dir():
            partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Make durable what a library has written."""
    _sync(path)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
