"""Running out of memory, on the host or a GPU: how to detect it, and a line that says which setting needs less."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shards.ground.errors import line_of

THREADS = "can't start new thread"
MORE_THREADS = "raise the limits on processes and memory (`ulimit -u`, `-v`), or lower data.workers, data.threads"

_LIMITS = {
    os.strerror(errno.EMFILE): "raise the limit on open files (`ulimit -n`)",
    os.strerror(errno.ENFILE): "the system has too many open; close some, or raise fs.file-max",
    os.strerror(errno.EAGAIN): MORE_THREADS,
    THREADS: MORE_THREADS,
}

_STARTS_PROCESSES = ("subprocess", "multiprocessing.popen_fork", "multiprocessing.util")
"""Modules from which an error of the system is one of starting a process."""

_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    THREADS,
    "bad_alloc",
    "alloc_failed",
)
_NOISE = re.compile(r"\[enforce fail at [^]]*\] *(err == 0\.)? *|Error code \d+ \(.*?\)")


class OutOfMemory(Exception):
    """Memory ran out; the message is one line and says what needs less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, and the error does not yet say what would need less."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY))


def line_of_memory(error: BaseException, advice: str = "") -> str:
    """What ran out, in one line."""
    text = " ".join(_NOISE.sub("", own_words(error)).split())
    first = ". ".join(text.split(". ")[:2]).rstrip(".")[:200] or type(error).__name__
    return f"out of memory ({first}){'; ' * bool(advice)}{advice}"


def own_words(error: BaseException) -> str:
    """The message of an error, without the traceback that torch adds to errors of worker processes."""
    text = str(error).strip()
    if "Traceback (most recent call last):" not in text:
        return text
    last = text.splitlines()[-1]
    return re.sub(r"^[\w.]+(: |$)", "", last) or last


def line_of_limit(error: BaseException) -> str:
    """A line, with the remedy, for a limit on files or processes that was reached, or for a busy file; else empty."""
    if not isinstance(error, OSError | RuntimeError):  # libraries of C++ raise the latter with the system's words in it
        return ""
    limit = next((words for words in _LIMITS if words in str(error)), "")
    if not limit:
        return ""
    if limit == os.strerror(errno.EAGAIN) and not _of_a_process(error):
        return line_of(error) if isinstance(error, OSError) else ""
    named = isinstance(error, OSError) and error.filename
    return f"{line_of(error) if named else limit}; {_LIMITS[limit]}"


def _of_a_process(error: OSError | RuntimeError) -> bool:
    """Whether what is "temporarily unavailable" is a process or thread; it may also be a lock, a file or an address."""
    if isinstance(error, OSError):
        # Neither an error of `fork` nor one of an open file has a name in it: where it comes from tells them apart.
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        return error.filename is None and bool(frames) and frames[-1] in _STARTS_PROCESSES
    words = str(error).strip()  # of C++'s threads nothing but the system's own
    return words == os.strerror(errno.EAGAIN) or any(word in words.lower() for word in ("thread", "process", "fork"))


@contextmanager
def memory_for(advice: str) -> Iterator[None]:
    """Wrap what needs memory because of a setting: if memory runs out, the line says what to lower.

    Raises:
        OutOfMemory: it did.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(line_of_memory(error, advice)) from error
        raise
