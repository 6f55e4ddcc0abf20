"""Memory that ran out, of the host or of a GPU: how to know it, and a line that says which setting needs less."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory",
              "can't start new thread", "bad_alloc", "alloc_failed")
_NOISE = re.compile(r"\[enforce fail at [^]]*\] *(err == 0\.)? *|Error code \d+ \(.*?\)")


class OutOfMemory(Exception):
    """Memory ran out; the message is one line and says what needs less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, and nobody has said yet what needs less."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY))


def line_of_memory(error: BaseException, advice: str = "") -> str:
    """What ran out, in a line."""
    text = " ".join(_NOISE.sub("", own_words(error)).split())
    first = ". ".join(text.split(". ")[:2]).rstrip(".")[:200] or type(error).__name__
    return f"out of memory ({first}){'; ' * bool(advice)}{advice}"


def own_words(error: BaseException) -> str:
    """The message of an error, without the traceback in it that torch adds to those of worker processes."""
    text = str(error).strip()
    if "Traceback (most recent call last):" not in text:
        return text
    last = text.splitlines()[-1]
    return re.sub(r"^[\w.]+(: |$)", "", last) or last


@contextmanager
def memory_for(advice: str) -> Iterator[None]:
    """Around what needs memory by a setting: should it run out, the line says what to lower.

    Raises:
        OutOfMemory: it did.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(line_of_memory(error, advice)) from error
        raise
