"""A file that is read at given places.

Not mapped into memory: where a file is cut while it is open, or its disk fails, a read is an error that can be listed;
a mapping sends SIGBUS, which ends the process.
"""

from __future__ import annotations

import os
from pathlib import Path

from shards.ground.files import naming


class OpenFile:
    """A file that stays open as long as this object lives. Threads and forked processes may share it.

    Attributes:
        path: the file.
        size: bytes that it had when it was opened.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, size: int) -> bytes:
        """The bytes from `start` on; fewer where the file ends, also where it was cut since.

        Raises:
            OSError: they cannot be read.
        """
        data, size = b"", max(0, min(size, self.size - start))
        with naming(self.path):
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), start + len(data))):
                data = data + more if data else more
        return data

    def is_removed(self) -> bool:
        """Whether the file has no name any more, and holds room on its disk only because it is open."""
        return os.fstat(self._descriptor).st_nlink == 0

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
