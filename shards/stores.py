"""Files behind a URL: any store that fsspec knows (s3://, gs://, http://, ...), and WebDataset's `pipe:` if allowed.

A store may be slow, away for minutes, hang or answer with half of what was asked for; here that is waited for, asked
again, and in the end reported in one line.
"""

from __future__ import annotations

import logging
import os
import random
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from shards.errors import InputError

ALLOW_PIPE = "LARGESCALE_ALLOW_PIPE"
"""Environment variable that must be 1 for `pipe:` commands to run: a recipe cannot allow itself to."""

REQUEST_BYTES = 16 * 2**20
"""Bytes asked for at a time; what has arrived is kept when a later request fails."""

_SLOWEST_UPLOAD = 2**20
"""Bytes a second below which an upload counts as standing still."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0

_DENIED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
"""What the libraries of stores raise, besides PermissionError, where asking again is of no use."""

_INHERITED: list[Any] = []
"""Clients that a forked process got from its parent."""

_log = logging.getLogger(__name__)


class Missing(Exception):
    """The store answers, and has no such file."""


def is_url(location: str) -> bool:
    """Whether a location is a store rather than a local folder."""
    return "://" in location or location.startswith("pipe:")


class Store:
    """A folder behind a URL.

    Args:
        url: `s3://bucket/folder`, `http://host/folder`, ..., or `pipe:COMMAND` whose `{name}` becomes the file.
        patience_s: how long a failing store is asked again before it counts as lost.
        stall_s: seconds without an answer after which a request is given up and made again.

    Raises:
        InputError: a scheme that fsspec does not know, or whose library is not installed; `pipe:` that is not allowed.
    """

    def __init__(self, url: str, *, patience_s: float = 600, stall_s: float = 60) -> None:
        self.url, self.patience_s, self.stall_s = url.rstrip("/"), patience_s, stall_s
        self._command = url.removeprefix("pipe:") if url.startswith("pipe:") else ""
        if self._command and os.environ.get(ALLOW_PIPE) != "1":
            raise InputError(f"{url}: runs a command of the shell; set {ALLOW_PIPE}=1 in the environment to allow that")
        if self._command and "{name}" not in self._command:
            raise InputError(f"{url}: expected {{name}} in the command, in the place of the file's name")
        if not self._command:
            _check_url(self.url)
            self._connect()

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            Missing: there is no such file.
            InputError: the store did not answer for `patience_s`.
        """
        if self._command:
            return self._patiently(name, lambda: self._run(name))
        return self._patiently(name, lambda: self._fs.cat_file(self._path(name)))

    def fetch(self, name: str, target: Path, size: int, progress: Callable[[int], None] = lambda done: None) -> None:
        """Bring a file of known size; what `target` already holds of it is not fetched again.

        Args:
            name: file below the URL.
            target: written to, and left as it is when this fails.
            size: bytes of the file.
            progress: called with the bytes that have arrived.

        Raises:
            Missing, InputError: as `read`.
            OSError: `target` cannot be written to.
        """
        if self._command:
            target.write_bytes(self._patiently(name, lambda: self._run(name)))
            return
        with target.open("ab") as file:
            while (done := file.tell()) < size:
                progress(done)
                end = min(size, done + REQUEST_BYTES)
                block = self._patiently(name, lambda start=done, end=end: self._range(name, start, end))
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes of a file from `start` to `end`.

        Raises:
            Missing, InputError: as `read`.
        """
        return self._patiently(name, lambda: self._range(name, start, end))

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            Missing, InputError: as `read`.
        """
        stated = self._patiently(name, lambda: self._fs.info(self._path(name)))["size"]
        return len(self.read(name)) if stated is None else int(stated)

    def entries(self, folder: str = "") -> list[tuple[str, bool, int]]:
        """What lies in a folder below the URL, by name: name, whether it is a folder, bytes (-1: not stated).

        Raises:
            Missing, InputError: as `read`.
        """
        where = self._path(folder).rstrip("/")
        found = {}
        for entry in self._patiently(folder, lambda: self._fs.ls(where, detail=True)):
            name = self._plain(entry["name"].removeprefix(f"{where}/").rstrip("/"))
            inside = entry["name"].startswith(f"{where}/") and name and "/" not in name
            if inside:  # some list the folder itself, or what is linked from its page
                size = -1 if entry["size"] is None else int(entry["size"])
                found[name] = (name, entry["type"] == "directory", size)
        return [found[name] for name in sorted(found)]

    def put(self, source: Path, name: str) -> None:
        """Upload a file; it appears under its name when it is whole, as object stores do it.

        Raises:
            InputError: the store did not take it for `patience_s`.
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
            InputError: the store did not answer for `patience_s`.
        """
        with suppress(Missing):
            self._patiently(name, lambda: self._fs.rm_file(self._path(name)))

    def _range(self, name: str, start: int, end: int) -> bytes:
        block = self._fs.cat_file(self._path(name), start=start, end=end)
        if len(block) > end - start:  # a server without range requests sends the whole file
            return block[start:end]
        if len(block) != end - start:
            raise OSError(f"sent {len(block)} bytes where {end - start} were asked for")
        return block

    def _run(self, name: str) -> bytes:
        command = self._command.replace("{name}", shlex.quote(name))
        result = subprocess.run(command, shell=True, capture_output=True, check=False)
        if result.returncode != 0:
            message = " ".join(result.stderr.decode("utf-8", "replace").split())[-200:]
            raise OSError(f"`{command}` ended with exit code {result.returncode}: {message}")
        return result.stdout

    def _connect(self) -> None:
        # Imported late: most runs read local shards.
        import fsspec

        try:
            # An instance of its own: after a hang, or a fork, a shared one may never answer again.
            self._fs, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"{self.url}: {error}") from error
        self._root = self._quoted(self._plain(root)).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{self._quoted(name)}"

    def _quoted(self, name: str) -> str:
        """A name as the store's library wants it: HTTP has it in its URLs."""
        return quote(name, safe="/:") if self.url.startswith("http") else name

    def _plain(self, name: str) -> str:
        return unquote(name) if self.url.startswith("http") else name

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "patience_s": self.patience_s, "stall_s": self.stall_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def begin_in_process(self) -> None:
        """Connect anew in a process that was forked. What it inherited must not be closed, not even by being forgotten:
        its event loop shares the parent's epoll, and would take the parent's connections out of it.
        """
        if not self._command:
            _INHERITED.append(self._fs)
            self._connect()

    def _patiently(self, name: str, request: Callable[[], Any], stall_s: float | None = None) -> Any:
        """Ask until there is an answer, with growing pauses, each between half and all of its length by chance."""
        gives_up = time.monotonic() + self.patience_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return _within(stall_s or self.stall_s, request)
            except FileNotFoundError as error:
                raise Missing(f"{self.url}/{name}: no such file") from error
            except Exception as error:  # every store's library has errors of its own
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if _is_denied(error):
                    raise InputError(f"{self.url}/{name}: permission denied ({what}); check the credentials") from error
                if time.monotonic() + pause > gives_up:
                    raise InputError(
                        f"{self.url}/{name}: no answer for {self.patience_s:.0f} s ({what}); is the store up?"
                    ) from error
                _log.warning("%s/%s: %s; asking again", self.url, name, what)
                if isinstance(error, TimeoutError) and not self._command:
                    self._connect()
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _check_url(url: str) -> None:
    """A malformed URL gets no answer, however often it is asked for. InputError: it is one."""
    try:
        parts = urlsplit(url)
        malformed = parts.scheme in ("http", "https") and (not parts.hostname or parts.port == 0)
    except ValueError:  # of brackets that are not closed, ports that are no numbers
        malformed = url.startswith("http")
    if malformed:
        raise InputError(f"{url}: malformed URL; expected such as https://host/folder")


def _is_denied(error: Exception) -> bool:
    return (isinstance(error, PermissionError) or type(error).__name__ in _DENIED
            or getattr(error, "status", None) in (401, 403))


def _within(seconds: float, request: Callable[[], Any]) -> Any:
    """Do a request in a thread of its own, which is left behind if it hangs: libraries cannot be interrupted.

    Raises:
        TimeoutError: no answer in that time.
    """
    answer: list[Any] = []
    failure: list[BaseException] = []

    def do() -> None:
        try:
            answer.append(request())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=do, daemon=True, name="store request")
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"nothing for {seconds:.0f} s")
    return answer[0]
