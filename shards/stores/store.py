"""Files behind a URL: any store that fsspec knows (s3://, gs://, http://, ...), and WebDataset's `pipe:` if allowed.

A store may be slow, away for minutes, hang or answer with half of what was asked for; here that is waited for, asked
again, and in the end reported in one line.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import random
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from shards.ground.errors import InputError
from shards.ground.pauses import let_go, pause
from shards.stores import pipe
from shards.stores.pages import OBJECT_STORES, Page, page_of
from shards.stores.store_errors import check_url, is_denied, is_missing, remedy, within

ALLOW_PIPE = "LARGESCALE_ALLOW_PIPE"
"""Environment variable that must be 1 for `pipe:` commands to run: a recipe cannot allow itself to."""

REQUEST_BYTES = 16 * 2**20
"""Bytes asked for at a time; what has arrived is kept when a later request fails."""

_SLOWEST_UPLOAD = 2**20
"""Bytes per second below which an upload counts as stalled."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0

_SPEAKS_AFTER_S, _SPEAKS_EVERY_S = 3.0, 30.0
"""A store that fails for this long is logged, and again from time to time after that."""

_IN_VAIN_S = 60.0
"""After a new connection that was denied too, no other one is made for so long: files may be denied by themselves."""

_INHERITED: list[Any] = []
"""Clients that a forked process got from its parent."""

_log = logging.getLogger(__name__)


class Missing(Exception):
    """The store answers, and has no such file."""


class Torn(Missing):
    """The store answers, and has less of the file than was asked for."""


class Refused(InputError):
    """The store gave no answer for a file, however long it was asked."""


class Forbidden(Refused):
    """The store denies a file, or all of them."""


def is_url(location: str) -> bool:
    """Whether a location is a store rather than a local folder."""
    return "://" in location or location.startswith("pipe:")


class Store:
    """A folder behind a URL.

    Args:
        url: `s3://bucket/folder`, `http://host/folder`, ..., or `pipe:COMMAND` whose `{name}` becomes the file.
        patience_s: how long a failing store is asked again before it counts as lost.
        stall_s: seconds without an answer after which a request is given up and made again.
        spelled: names of files over HTTP are the rest of their URLs as somebody wrote them, with a query perhaps; else
            they are what the files are called.

    Raises:
        InputError: a scheme that fsspec does not know, or whose library is not installed; `pipe:` that is not allowed.
    """

    def __init__(self, url: str, *, patience_s: float = 600, stall_s: float = 60, spelled: bool = False) -> None:
        self.url, self.patience_s, self.stall_s, self._spoke = url.rstrip("/"), patience_s, stall_s, -_SPEAKS_EVERY_S
        self._spelled, self._renewed_in_vain = spelled, -_IN_VAIN_S
        self._command = url.removeprefix("pipe:") if url.startswith("pipe:") else ""
        if self._command and os.environ.get(ALLOW_PIPE) != "1":
            raise InputError(f"{url}: runs a command of the shell; set {ALLOW_PIPE}=1 in the environment to allow that")
        if self._command and "{name}" not in self._command:
            raise InputError(f"{url}: expected {{name}} in the command, in place of the file's name")
        if not self._command:
            check_url(self.url)
            try:
                self._connect()
            except Exception as error:  # some connect at once, each with errors of its own
                raise InputError(f"{self.url}: {remedy(error)}") from error

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            Missing: there is no such file.
            Forbidden: we may not read it.
            Refused: the store did not answer for `patience_s`.
        """
        if self._command:
            return self._patiently(name, lambda: self._run(name, io.BytesIO()).getvalue())
        return self._patiently(name, lambda: self._fs.cat_file(self._path(name)))

    def fetch(self, name: str, target: Path, size: int, progress: Callable[[int], None] = lambda done: None) -> None:
        """Bring a file of known size; what `target` already holds of it is not fetched again.

        Args:
            name: file below the URL.
            target: written to, and left as it is when this fails.
            size: bytes of the file.
            progress: called with the bytes that have arrived.

        Raises:
            Missing, Refused: as `read`.
            Torn: the store has less than `size` bytes of it.
            OSError: `target` cannot be written to.
        """
        with target.open("ab") as file:
            if self._command:
                self._patiently(name, lambda: self._run(name, file, progress))
            while not self._command and (done := file.tell()) < size:
                progress(done)
                end = min(size, done + REQUEST_BYTES)
                file.write(self._patiently(name, partial(self._range, name, done, end, rest=True)))
            file.flush()
            os.fsync(file.fileno())

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a file from `start` to `end`.

        Raises:
            Missing, Refused: as `read`.
            Torn: the file ends before `end`.
        """
        if self._command:
            found = self.read(name)[start:end]
            if len(found) < end - start:
                raise Torn(f"{self.url}/{name}: ends before byte {end:,}")
            return found
        return self._patiently(name, lambda: self._range(name, start, end))

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            Missing, Refused: as `read`.
        """
        if self._command:
            return len(self.read(name))
        stated = self._patiently(name, lambda: self._fs.info(self._path(name)))["size"]
        return len(self.read(name)) if stated is None else int(stated)

    def entries(self, folder: str = "") -> list[tuple[str, bool, int]]:
        """What lies in a folder below the URL, by name: name, whether it is a folder, bytes (-1: not stated).

        Object stores have keys, not folders: a file and a folder may share a name, and what lies behind an empty name
        (`raw//a.jpg`) is listed as files whose names begin with a slash.

        Raises:
            Missing, Refused: as `read`.
        """
        found = self._by_pages(folder) if self.url.startswith(OBJECT_STORES) else self._at_once(folder)
        return sorted({(name, is_folder): (name, is_folder, size) for name, is_folder, size in found}.values())

    def _by_pages(self, folder: str) -> Iterator[tuple[str, bool, int]]:
        """What an object store lists: a folder of any number of keys, since each page is asked for by itself."""
        bucket, key, _ = self._fs.split_path(self._path(folder).rstrip("/"))
        prefix, is_empty = f"{key}/" if key else "", True
        for page in self._pages(folder, bucket, prefix, "/"):
            is_empty = is_empty and not page.files and not page.folders
            for name, size in page.files:
                if name != prefix:  # some list the folder itself
                    yield name.removeprefix(prefix), False, size
            for name in page.folders:
                if name != f"{prefix}/":
                    yield name.removeprefix(prefix)[:-1], True, 0
                    continue
                for inside in self._pages(folder, bucket, name, ""):
                    yield from ((key.removeprefix(prefix), False, size) for key, size in inside.files if key[-1] != "/")
        if is_empty and prefix:
            raise Missing(f"{self.url}/{folder}: no such file")

    def _pages(self, folder: str, bucket: str, prefix: str, delimiter: str) -> Iterator[Page]:
        after, is_last = "", False
        while not is_last:
            page = self._patiently(folder, partial(self._page, bucket, prefix, delimiter, after))
            after, is_last = page.next, not page.next
            yield page

    def _page(self, *which: str) -> Page:
        return page_of(self._fs, *which)  # after a hang that is another connection

    def _at_once(self, folder: str) -> Iterator[tuple[str, bool, int]]:
        """What any other store lists, in one answer: web servers send a page, what the others do cannot be seen."""
        where = self._path(folder).rstrip("/")
        stall_s = self.stall_s if self.url.startswith("http") else max(self.stall_s, self.patience_s)
        for entry in self._patiently(folder, lambda: self._fs.ls(where, detail=True), stall_s):
            name = self._plain(entry["name"].removeprefix(f"{where}/").rstrip("/"))
            inside = entry["name"].startswith(f"{where}/")
            if inside and name and "/" not in name:  # some list the folder itself, or what is linked from its page
                yield name, entry["type"] == "directory", -1 if entry["size"] is None else int(entry["size"])

    def put(self, source: Path, name: str) -> None:
        """Upload a file; it appears under its name when it is whole, as object stores do it.

        Raises:
            Refused: the store did not take it for `patience_s`.
        """
        size = source.stat().st_size
        target = self._path(name)

        def put() -> None:
            self._fs.put_file(str(source), target)
            if (stored := int(self._fs.info(target)["size"])) != size:
                raise OSError(f"holds {stored} bytes of {size}")

        self._patiently(name, put, stall_s=self.stall_s + size / _SLOWEST_UPLOAD)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            Refused: the store did not answer for `patience_s`.
        """
        with suppress(Missing):
            self._patiently(name, lambda: self._fs.rm_file(self._path(name)))

    def _range(self, name: str, start: int, end: int, *, rest: bool = False) -> bytes:
        """Bytes of a file from `start` to `end`; with `rest` beyond that, where the store sends all anyway."""
        try:
            block = self._fs.cat_file(self._path(name), start=start, end=end)
        except Exception as error:
            if getattr(error, "status", None) == 416 or getattr(error, "errno", None) == errno.EINVAL:  # out of range
                self._check_length(name, end)
            raise
        if len(block) > end - start:  # a server without range requests sends the whole file
            block = block[start : None if rest else end]
        if len(block) < end - start:
            self._check_length(name, end)
            raise OSError(f"sent {len(block)} bytes where {end - start} were asked for")
        return block

    def _check_length(self, name: str, end: int) -> None:
        """Tell a file that is too short from an answer that is. Torn: the store says that it ends before `end`."""
        length = end
        with suppress(Exception):  # without an answer nothing is known
            stated = self._fs.info(self._path(name))["size"]
            length = len(self._fs.cat_file(self._path(name))) if stated is None else int(stated)
        if length < end:
            raise Torn(f"{self.url}/{name}: ends at byte {length:,}, expected at least {end:,}")

    def _run(self, name: str, file: Any, progress: Callable[[int], None] = lambda done: None) -> Any:
        """Fill a file with what the command writes."""
        file.seek(0)
        file.truncate()

        def write(block: bytes) -> None:
            file.write(block)
            progress(file.tell())

        pipe.run(self._command.replace("{name}", shlex.quote(name)), write, self.stall_s)
        return file

    def _connect(self) -> None:
        # Imported late: most runs read local shards.
        import fsspec

        # An instance of its own: after a hang, or a fork, a shared one may never answer again.
        self._fs, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
        self._root = self._quoted(self._plain(root)).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{self._quoted(name)}"

    def _quoted(self, name: str) -> str:
        """A name as the store's library wants it: HTTP has it in its URLs."""
        return quote(name, safe="/:") if self.url.startswith("http") and not self._spelled else name

    def _plain(self, name: str) -> str:
        return unquote(name) if self.url.startswith("http") and not self._spelled else name

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "patience_s": self.patience_s, "stall_s": self.stall_s, "spelled": self._spelled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Store.__init__(self, **state)

    def begin_in_process(self) -> None:
        """Reconnect in a forked process, when it asks first. What it inherited must not be closed, not even by being
        garbage-collected: its event loop shares the parent's epoll, and would take the parent's connections out of it.
        """
        if not self._command:
            _INHERITED.append(self._fs)
            self._fs = None

    def _patiently(self, name: str, request: Callable[[], Any], stall_s: float | None = None) -> Any:
        """Ask until there is an answer, with growing pauses, each between half and all of its length by chance."""
        began, pause_s, was_denied = time.monotonic(), _FIRST_PAUSE_S, False

        def ask() -> Any:
            if self._fs is None:
                self._connect()
            return request()

        while True:
            try:  # a command watches itself
                return request() if self._command else within(stall_s or self.stall_s, ask)
            except Missing:
                raise
            except Exception as error:  # every store's library has errors of its own
                let_go()  # what ended the wait is no answer
                if is_missing(error):
                    raise Missing(f"{self.url}/{name}: no such file") from error
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # this disk, not the store
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                may_renew = not (was_denied or self._command) and time.monotonic() > self._renewed_in_vain + _IN_VAIN_S
                if is_denied(error) and may_renew:
                    was_denied = True
                    with suppress(Exception):  # the credentials that it has read may have been renewed since
                        self._connect()
                    continue
                if is_denied(error):
                    if was_denied:
                        self._renewed_in_vain = time.monotonic()
                    raise Forbidden(f"{self.url}/{name}: permission denied ({what}); check the credentials") from error
                if time.monotonic() + pause_s > began + self.patience_s:
                    raise Refused(
                        f"{self.url}/{name}: no answer for {self.patience_s:.0f} s ({what}); is the store up?"
                    ) from error
                self._speak(name, what, time.monotonic() - began)
                if isinstance(error, TimeoutError) and not self._command:
                    with suppress(Exception):  # away for that, too
                        self._connect()
            pause(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _speak(self, name: str, what: str, seconds: float) -> None:
        now = time.monotonic()
        if seconds > _SPEAKS_AFTER_S and now - self._spoke > _SPEAKS_EVERY_S:
            self._spoke = now
            _log.warning(
                "%s/%s: no answer for %.0f s (%s); asking again, for up to %.0f s",
                self.url,
                name,
                seconds,
                what,
                self.patience_s,
            )

    def impatient(self) -> Store:
        """The same store by the same connection, asked once."""
        twin = object.__new__(Store)
        twin.__dict__.update(self.__dict__)
        twin.patience_s = 0
        return twin
