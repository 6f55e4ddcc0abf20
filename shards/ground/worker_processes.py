"""Processes that work for a command: they end when it does, however it does, and their troubles are a line each."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from shards.ground.errors import InputError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Item = TypeVar("Item")
Result = TypeVar("Result")


def die_with_parent() -> None:
    """To be called in a process that another one started: be killed when that dies, even by SIGKILL. Linux only.

    One that outlived its parent would go on writing while the same command is at work again.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_signals_to_parent() -> None:
    """To be called in a process that works for a command: what asks both to end is answered by the command."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def over(
    do: Callable[[Item], Result], items: Sequence[Item], workers: int, context: BaseContext | None = None
) -> Iterator[Result]:
    """What `do` returns for each item, in order, from several processes; from this one where one is enough.

    Args:
        do: is sent to each process once.
        items: to do it for.
        workers: processes at most.
        context: how to start them.

    Raises:
        InputError: processes cannot be started, one was killed, or memory was short.
    """
    try:
        if workers == 1 or len(items) <= 1:
            yield from map(do, items)
        else:
            yield from _in_pool(do, items, min(workers, len(items)), context)
    except BrokenProcessPool as error:
        forks = (context or multiprocessing.get_context()).get_start_method() == "fork"
        guard = "" if forks else '; a program that calls this needs `if __name__ == "__main__":` around it'
        raise InputError(
            "a worker process was killed, most likely by the kernel because memory ran out; run the same "
            f"command again with fewer --workers: finished work is kept{guard}"
        ) from error
    except MemoryError as error:
        what = f"memory ran out ({error})" if str(error) else "memory ran out"
        raise InputError(
            f"{what}; free some, or run the same command again with fewer --workers: finished work stays"
        ) from error


def _in_pool(
    do: Callable[[Item], Result], items: Sequence[Item], workers: int, context: BaseContext | None
) -> Iterator[Result]:
    before = set(multiprocessing.active_children())
    try:
        pool = ProcessPoolExecutor(workers, context, _begin, (pickle.dumps(do),))
        results = pool.map(_do, items)
    except (OSError, RuntimeError) as error:  # the latter where a thread cannot be started
        for process in _kill_all_but(before):
            process.join()
        raise InputError(_why_not_started(error, workers)) from error
    try:
        yield from results
    except BaseException:
        # Processes in the middle of an item would delay the end of an interrupted command. The pool's own thread
        # waits for them: were they waited for here as well, one of the two would not learn that they have ended.
        _kill_all_but(before)
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _kill_all_but(before: set[BaseProcess]) -> set[BaseProcess]:
    started = set(multiprocessing.active_children()) - before
    for process in started:
        process.kill()
    return started


def _why_not_started(error: OSError | RuntimeError, workers: int) -> str:
    why = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT):
        return (
            f"/dev/shm: {why}, so worker processes cannot be started; make room there (a container may "
            f"need --shm-size), or use --workers 1"
        )
    return (
        f"{workers} worker processes cannot be started ({why}); use fewer --workers, or raise the limit "
        f"(`ulimit -n`, `ulimit -u`)"
    )


_in_process: Callable[[Any], Any]
"""In a process of a pool: what it does."""


def _begin(pickled: bytes) -> None:
    # A copy, even in a forked process: archives and connections that the parent has open are not to be shared.
    global _in_process
    leave_signals_to_parent()
    _in_process = pickle.loads(pickled)


def _do(item: Any) -> Any:
    return _in_process(item)
