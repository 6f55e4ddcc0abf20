"""Folders to read from: on a disk, or behind the URL of a store. Both list, read and open files in the same way."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from shards.ground.errors import InputError
from shards.stores.store import Forbidden, Missing, Refused, Store, Torn, is_url

STORE_READS = 32
"""Files of a store that a process reads at a time: each takes as long as the store needs to answer, not as we do."""

LINK, BROKEN = "a link to a folder", "a link that leads nowhere"
"""Why an entry of a folder is not read, if it is not a plain file."""

NO_ANSWER = "the store gives others, but no answer for this one"
"""Why a file of a store is not read that is asked for in vain."""

_NO_FILE = "not a regular file"

_READ_AHEAD, _LONGEST_READ_AHEAD = 2**16, 2**24


class Denied(InputError):
    """A folder that we may not look into."""


@dataclass(frozen=True)
class Entry:
    """What lies in a folder: a file (of `size` bytes, -1 where that is not known), a folder, or, as `other` says,
    something else.
    """

    name: str
    is_folder: bool
    size: int = -1
    other: str = ""


class Folder(Protocol):
    """A folder; names of files are relative to it.

    Attributes:
        location: path or URL.
        reads: how many files are best read at a time.
    """

    location: str
    reads: int

    def entries(self, folder: str = "") -> list[Entry]:
        """What lies in it, or in a folder below it (whose name ends in a slash), by name. InputError: not listable;
        Denied: for lack of permissions.
        """
        ...

    def read(self, name: str) -> bytes:
        """A whole file. OSError: not readable."""
        ...

    def read_spans(self, name: str, spans: list[tuple[int, int]]) -> list[bytes]:
        """Some (start, size) of a file. OSError: not readable."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A file that can seek. OSError: not readable."""
        ...

    def size(self, name: str) -> int:
        """Bytes of a file, -1 where asking is not worth it. OSError: not there."""
        ...

    def compare_with(self, names: list[str]) -> None:
        """Name some files that a store may be asked for when it refuses another: if it gives one of them, the refused
        one cannot be read, and if not, none can.
        """
        ...


def open_folder(location: str) -> LocalFolder | StoreFolder:
    """The folder at a path or URL."""
    return StoreFolder(location) if is_url(location) else LocalFolder(location)


class LocalFolder:
    """A folder on a disk."""

    reads = 1

    def __init__(self, location: str) -> None:
        self.location = os.path.abspath(location)

    def entries(self, folder: str = "") -> list[Entry]:
        """See `Folder`. Links to files are followed, links to folders are not: they may lead in a circle."""
        try:
            with os.scandir(self._path(folder)) as found:
                inside = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            text = f"{error.filename}: cannot be listed ({error.strerror}); fix its permissions or move it away"
            raise (Denied if isinstance(error, PermissionError) else InputError)(text) from error
        return [_entry(entry) for entry in inside]

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        with self.open(name) as file:
            return file.read()

    def read_spans(self, name: str, spans: list[tuple[int, int]]) -> list[bytes]:
        """See `Folder`."""
        with self.open(name) as file:
            return [os.pread(file.fileno(), size, start) for start, size in spans]

    def open(self, name: str) -> BinaryIO:
        """See `Folder`."""
        return open(self._path(name), "rb", opener=_open_regular)

    def size(self, name: str) -> int:
        """See `Folder`."""
        return os.stat(self._path(name)).st_size

    def compare_with(self, names: list[str]) -> None:
        """See `Folder`: a disk says what is wrong."""

    def _path(self, name: str) -> str:
        return os.path.join(self.location, name)


class StoreFolder:
    """A folder behind a URL (see store.py).

    Args:
        location: the URL.
        spelled: see `Store`.

    Raises:
        InputError: no such store, or one that cannot list.
    """

    reads = STORE_READS

    def __init__(self, location: str, *, spelled: bool = False) -> None:
        if location.startswith("pipe:"):
            raise InputError(f"{location}: a command cannot be listed; pass a folder, or the URL of a store")
        self.location = location.rstrip("/")
        self._store = Store(self.location, spelled=spelled)
        self._given = ""
        self._others: list[str] = []

    def entries(self, folder: str = "") -> list[Entry]:
        """See `Folder`."""
        try:
            found = self._store.entries(folder.rstrip("/"))
        except Missing as error:
            raise InputError(f"{error}; pass the URL of a folder that holds images or tars") from error
        return [Entry(name, is_folder, size) for name, is_folder, size in found]

    def read(self, name: str) -> bytes:
        """See `Folder`."""
        return self._given_or_os_error(name, lambda store: store.read(name))

    def read_spans(self, name: str, spans: list[tuple[int, int]]) -> list[bytes]:
        """See `Folder`. Members of a sample lie side by side: one request brings them all. Where they are links to
        others they may lie far apart: then each is a request.
        """
        if not spans:
            return []
        first, last = min(start for start, _ in spans), max(start + size for start, size in spans)
        if len(spans) > 1 and last - first > sum(size for _, size in spans) + _LONGEST_READ_AHEAD:
            return [block for span in spans for block in self.read_spans(name, [span])]
        block = self._given_or_os_error(name, lambda store: store.read_range(name, first, last))
        return [block[start - first : start - first + size] for start, size in spans]

    def open(self, name: str) -> BinaryIO:
        """See `Folder`."""
        size = self._given_or_os_error(name, lambda store: store.size(name), counts=False)
        return io.BufferedReader(_StoreFile(self, name, size), 2**16)

    def size(self, name: str) -> int:
        """See `Folder`: a request for every file of a long list would take longer than reading them."""
        return -1

    def compare_with(self, names: list[str]) -> None:
        """See `Folder`."""
        self._others = names

    def _given_or_os_error(self, name: str, request: Callable[[Store], Any], *, counts: bool = True) -> Any:
        """What every reader of files expects of one that is not there, or that is refused though others are given.

        Args:
            name: of the file.
            request: for it.
            counts: whether it asks for the file's bytes, which a store may refuse though it says how many they are.
        """
        try:
            try:
                answer = request(self._store)
            except Refused as error:
                store = self._store if isinstance(error, Forbidden) else self._store.impatient()  # it was waited for
                # The last one first: credentials may end while files are read.
                if not any(_gives(store, other) for other in (self._given, *self._others) if other not in ("", name)):
                    raise
                answer = _again(store.impatient(), request)
        except Missing as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        if counts:
            self._given = name
        return answer


class _StoreFile(io.RawIOBase):
    """A file of a store, read by ranges: further and further ahead for as long as it is read from front to back."""

    def __init__(self, folder: StoreFolder, name: str, size: int) -> None:
        self._folder, self._name, self._size = folder, name, size
        self._place, self._start, self._block, self._ahead = 0, 0, b"", _READ_AHEAD

    def readable(self) -> bool:
        """True: see io.IOBase."""
        return True

    def seekable(self) -> bool:
        """True: see io.IOBase."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io.IOBase."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        """See io.IOBase."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase."""
        if self._place >= self._size:
            return 0
        end = self._start + len(self._block)
        if not self._start <= self._place < end:
            in_order = 0 <= self._place - end <= self._ahead
            self._ahead = min(2 * self._ahead, _LONGEST_READ_AHEAD) if in_order else _READ_AHEAD
            last = min(self._size, self._place + max(self._ahead, len(buffer)))
            [self._block] = self._folder.read_spans(self._name, [(self._place, last - self._place)])
            self._start = self._place
        found = self._block[self._place - self._start :][: len(buffer)]
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


def _entry(entry: os.DirEntry[str]) -> Entry:
    is_folder = entry.is_dir(follow_symlinks=False)
    try:
        status = entry.stat()
    except OSError as error:
        is_broken = entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        return Entry(entry.name, is_folder, other=BROKEN if is_broken else "")  # reading it will say what is wrong
    is_link = stat.S_ISDIR(status.st_mode) and not is_folder
    other = "" if is_folder or stat.S_ISREG(status.st_mode) else LINK if is_link else _NO_FILE
    return Entry(entry.name, is_folder, status.st_size, other)


def _open_regular(path: str, flags: int) -> int:
    """Open a file, and nothing that gives bytes forever (devices) or waits for them (pipes)."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, _NO_FILE)
    return descriptor


def _again(store: Store, request: Callable[[Store], Any]) -> Any:
    """The answer to one more request, since what ended the first one, such as an outage, may be over by now.

    Raises:
        OSError: this file alone is refused.
    """
    try:
        return request(store)
    except Forbidden as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from error
    except Refused as error:
        raise OSError(0, NO_ANSWER) from error


def _gives(store: Store, name: str) -> bool:
    """Whether a store gives the beginning of a file."""
    try:
        store.read_range(name, 0, 1)
    except Torn:  # an empty file
        return True
    except (Missing, InputError):
        return False
    return True
