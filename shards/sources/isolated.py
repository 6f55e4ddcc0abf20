"""Reads foreign files in a process of its own, where damage may crash the library for them: then that is a line."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from shards.ground.errors import InputError
from shards.ground.worker_processes import leave_signals_to_parent

_AT_ONCE = 4096
"""Rows that are sent at a time."""


def rows_apart(rows: Callable[[], Iterator[Any]], where: str, context: BaseContext) -> Iterator[Any]:
    """What `rows` yields, by way of a process that is started for it and ends with this iterator.

    Args:
        rows: called there; the only exception that it raises is InputError.
        where: the file, for the user.
        context: how to start the process.

    Raises:
        InputError: what `rows` raises; or the process cannot be started, or died.
    """
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(  # type: ignore[attr-defined]  # typeshed: on each kind of context, not on their base
        target=_send, args=(rows, sending), daemon=True
    )
    try:
        process.start()
    except OSError as error:
        raise InputError(
            f"{where}: a process that reads it cannot be started ({error.strerror}); free memory, or "
            f"raise the limit (`ulimit -u`)"
        ) from error
    sending.close()
    try:
        while (block := receiving.recv()) is not None:
            if isinstance(block, str):
                raise InputError(block)
            yield from block
    except EOFError as error:
        process.join()
        raise InputError(_why_dead(where, process.exitcode or 0)) from error
    finally:
        process.kill()
        process.join()
        receiving.close()


def _send(rows: Callable[[], Iterator[Any]], sending: Connection) -> None:
    """In the process: blocks of rows, then None; or a text that says what is wrong."""
    leave_signals_to_parent()
    left = rows()
    try:
        while block := list(islice(left, _AT_ONCE)):
            sending.send(block)
        sending.send(None)
    except InputError as error:
        sending.send(str(error))


def _why_dead(where: str, exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return (
            f"{where}: the process that read it was killed, most likely by the kernel because memory ran out; free "
            f"some, or write the list as .csv or .jsonl, which need next to none"
        )
    how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
    return (
        f"{where}: cannot be read (it crashes the library that reads such files, {how}); it is damaged: write it "
        f"again, or as .csv or .jsonl"
    )
