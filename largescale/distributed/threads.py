"""Starts as many threads as will be needed before anything else, to see whether the system allows them.

Where a limit (`ulimit -u`, or that on the pids of a container or job) leaves too few, gloo, NCCL and OpenBLAS abort the
process or wait forever, which nobody can catch afterwards.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from shards.ground.errors import InputError

GROUPS = 6
"""Threads of two groups of ranks: the one that trains, and the one that saves."""

COMMAND = 10
"""Threads that every command with a group of ranks starts; a training needs somewhat more."""

_HOLD = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this process
threading.stack_size(64 * 1024)  # threads that only wait; those of default size could meet a limit on memory first
wanted, held, never = int(sys.argv[1]), 1, threading.Event()  # this process is one
try:
    while held < wanted:
        threading.Thread(target=never.wait, daemon=True).start()
        held += 1
except RuntimeError:
    pass  # refused
print(held, flush=True)
sys.stdin.read()  # until the command ends or kills it
"""


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
    # In a process of their own, because what the C library maps for a thread (64 MB of address space) stays mapped; and
    # in a new one: a copy of this one could wait forever for a lock that another thread of it held.
    command = [sys.executable, "-I", "-S", "-c", _HOLD, str(num)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        )
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
        raise InputError(_too_few(0, num, remedy)) from error
    with process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            # Without an answer it was killed: that says nothing about a limit.
            if said and (held := int(said)) < num:
                raise InputError(_too_few(held, num, remedy))
            yield
        finally:
            process.kill()


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


def _too_few(held: int, num: int, remedy: str) -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    now = "" if limit == resource.RLIM_INFINITY else f", now {limit}"
    return (
        f"this process needs {num} more threads and processes, and the system allows it {held}: raise the user's "
        f"limit (`ulimit -u`{now}) or that of the container or job (pids){'; or ' * bool(remedy)}{remedy}"
    )
