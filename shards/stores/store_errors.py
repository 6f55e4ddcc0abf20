"""What the libraries of stores answer, each in its own way: denied, missing, nothing at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from shards.ground.errors import InputError
from shards.ground.pauses import joined

_DENIED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
"""What the libraries of stores raise, besides PermissionError, where asking again is of no use."""


def check_url(url: str) -> None:
    """A malformed URL gets no answer, however often it is asked for. InputError: it is one."""
    try:
        parts = urlsplit(url)
        malformed = parts.scheme in ("http", "https") and (not parts.hostname or parts.port == 0)
    except ValueError:  # of brackets that are not closed, ports that are no numbers
        malformed = url.startswith("http")
    if malformed:
        raise InputError(f"{url}: malformed URL; expected one such as https://host/folder")


def remedy(error: Exception) -> str:
    """Why no store is behind a URL, and what to check."""
    what = " ".join(str(error).split())[:200]
    if isinstance(error, ImportError):
        return what
    if "Protocol not known" in what:
        return f"{what}; expected one such as s3://bucket/folder, gs://bucket/folder or https://host/folder"
    return f"cannot be opened ({type(error).__name__}: {what}); check the address, and whether the store is up"


def is_missing(error: Exception) -> bool:
    """Whether the store says that there is no such file."""
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 410


def is_denied(error: Exception) -> bool:
    """Whether asking again is of no use without other credentials."""
    return (
        isinstance(error, PermissionError)
        or type(error).__name__ in _DENIED
        or getattr(error, "status", None) in (401, 403)
        or (type(error) is OSError and str(error).startswith("Forbidden: "))  # Google's
    )


def within(seconds: float, request: Callable[[], Any]) -> Any:
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
    joined(thread, seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"nothing for {seconds:.0f} s")
    return answer[0]
