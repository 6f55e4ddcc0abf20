"""Starts as many threads as will be needed before anything else, to see whether the system allows them.

Where a limit (`ulimit -u`, or that on the pids of a container or job) leaves too few, gloo, NCCL and OpenBLAS abort the
process or wait forever, which nobody can catch afterwards.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from largescale.distributed import stopping
from shards.ground.errors import InputError

GROUPS = 6
"""Threads of two groups of ranks: the one that trains, and the one that saves."""

COMMAND = 10
"""Threads that every command with a group of ranks starts; a training needs somewhat more."""

_STACK_BYTES = 64 * 1024
"""A thread that only waits needs no more; those of default size could meet a limit on memory first."""


@contextmanager
def allowed(num: int, remedy: str = "") -> Iterator[None]:
    """Hold this many threads, in a process of their own, while the block runs.

    Ranks that all hold theirs at one moment know that the machine has room for those of all.

    Args:
        num: threads and processes that this process is going to start.
        remedy: what would need fewer, if anything.

    Raises:
        InputError: the system does not allow that many.
    """
    # In a process of their own, because what the C library maps for a thread (64 MB of address space) stays mapped.
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(num, there), name="threads", daemon=True)
    try:
        with stopping.held():
            process.start()
    except OSError as error:
        for end in (here, there):
            end.close()
        if error.errno != errno.EAGAIN:
            raise
        raise InputError(_too_few(0, num, remedy)) from error
    there.close()
    try:
        try:
            held = here.recv()
        except EOFError:  # it was killed: that says nothing about a limit
            held = num
        if held < num:
            raise InputError(_too_few(held, num, remedy))
        yield
    finally:
        process.kill()
        process.join()
        here.close()


def require(num: int, remedy: str = "") -> None:
    """Check that this process may start so many threads and processes now; see `allowed`.

    Raises:
        InputError: it may not.
    """
    with allowed(num, remedy):
        pass


def of_math() -> int:
    """Threads that libraries start to compute with: OpenMP's, and as many of OpenBLAS when it is loaded."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (int(wanted) if wanted.isdecimal() and int(wanted) else cpus) - 1


def _hold(num: int, connection: Connection) -> None:
    """In the process: start the threads, say how many there are, and wait to be killed."""
    stopping.live_and_die_with_parent()
    threading.stack_size(_STACK_BYTES)
    never = threading.Event()
    held = 1  # this process
    try:
        while held < num:
            threading.Thread(target=never.wait, daemon=True).start()
            held += 1
    except RuntimeError:
        pass  # refused; the parent says so
    connection.send(held)
    never.wait()


def _too_few(held: int, num: int, remedy: str) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    now = "" if limit == resource.RLIM_INFINITY else f", now {limit}"
    return (
        f"this process needs {num} more threads and processes, and the system allows it {held}: raise the user's "
        f"limit (`ulimit -u`{now}) or that of the container or job (pids){'; or ' * bool(remedy)}{remedy}"
    )
