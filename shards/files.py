"""Files that are either whole or not there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is whole, and `durable`: on the disk.

    It is written under a temporary name in the same folder, which is made if needed; a failure removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
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


def begin_write_out(file: BinaryIO, start: int, size: int) -> None:
    """Have the kernel send a stretch of a file to the disk while we go on, so that fsync has little left to wait for.

    Only Linux can be asked to; elsewhere, and where it declines, all is left to fsync.
    """
    if _SYNC_FILE_RANGE is not None:
        file.flush()
        _SYNC_FILE_RANGE(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(size), _WRITE)


_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of <fcntl.h>


def remove_partial_files(folder: Path) -> None:
    """Remove what `atomic_write` left in a folder when its process was killed; nobody else may write there."""
    for partial in folder.glob(".*.writing"):
        if not partial.is_dir():
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
