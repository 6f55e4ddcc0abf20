"""Files that grow record by record and only hold whole records, even if the disk is full or away for a while."""

from __future__ import annotations

import logging
from io import FileIO
from pathlib import Path

from shards.ground.files import NO_ROOM

MAX_WAITING = 100
"""Records that may wait to be written before the run gives up; a crash meanwhile would lose them."""

_log = logging.getLogger(__name__)


class Records:
    """A file that records are appended to, each written at once.

    What cannot be written waits in memory and is written before the next record, so a disk that is full for a
    while only costs a warning.

    Args:
        path: the file; its folder is made if needed, later if there is no room for it now.

    Raises:
        OSError: it cannot be made, and not for want of room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._size = 0  # of the whole records
        self._waiting: list[bytes] = []
        try:
            self._opened()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise

    def append(self, record: bytes) -> None:
        """Write one record.

        Raises:
            OSError: the last MAX_WAITING writes all failed.
        """
        self._waiting.append(record)
        try:
            self._write_waiting()
        except OSError as error:
            if len(self._waiting) >= MAX_WAITING:
                raise OSError(error.errno, f"{error.strerror}, {MAX_WAITING} times in a row", str(self.path)) from error
            if len(self._waiting) == 1:
                _log.warning(
                    "%s: %s; will retry with each of the next %d records, then stop the run",
                    self.path,
                    error.strerror,
                    MAX_WAITING,
                )

    def close(self) -> None:
        """Write what waits and close the file.

        Raises:
            OSError: it still cannot be written.
        """
        try:
            self._write_waiting()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            if self._file is not None:
                self._file.close()

    def _opened(self) -> FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
            self._size = self.path.stat().st_size
        return self._file

    def _write_waiting(self) -> None:
        while self._waiting:
            rest, file = memoryview(self._waiting[0]), self._opened()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(self._size)  # half a record
                raise
            self._size += len(self._waiting.pop(0))
