"""The one exception for what a user can fix, and errors in a line."""

from __future__ import annotations

import errno


class InputError(ValueError):
    """Input that cannot be used as it is; its message is one line: what, where, how to fix."""


class NotEnoughMemory(InputError):
    """There is not enough memory, which says nothing about what was to be read."""


_BUSY = "another process may hold a lock on it, or its file system be busy: run the same command again"


def line_of(error: BaseException) -> str:
    """An error in a line: of one of the operating system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return f"{error.filename or 'a file'}: {error.strerror}; {_BUSY}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
