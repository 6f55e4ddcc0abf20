"""A launcher of the `largescale` command whose ranks are forked from a warm server."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import torch.distributed as dist

from largescale.__main__ import main
from tests.helpers.commands import TINY, checked, environment
from tests.helpers.ranks import forking

_GRACE_S = 30.0
"""Time for ranks to leave after one of them has failed; torchrun gives them as much."""


def run_largescale(
    *arguments: object, ranks: int = 1, timeout_s: float = 900, check: bool = True, entry: Callable[[], int] = main
) -> subprocess.CompletedProcess[str]:
    """Run `largescale ARGUMENTS` on some ranks, without the seconds in which interpreter and launcher import torch.

    The helper does for the ranks what torchrun does: keeps their store, and ends them when one has failed. What a test
    says of torchrun itself, or of how a process begins, is for `run_python`.

    Args:
        entry: what each rank calls, in place of the command's own entry point.
    """
    command = [str(argument) for argument in arguments]
    # The store's port is free and stays its own; ranks that would open one might find it taken.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            forking().Process(target=_rank, args=(entry, command, folder, _environment(store, rank, ranks)))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        code = _wait_for_all(processes, time.monotonic() + timeout_s)
        out, err = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    result = subprocess.CompletedProcess(["largescale", *command], code, out, err)
    return checked(result) if check else result


def pretrain(overrides: list[str], ranks: int = 1) -> None:
    """Run `largescale pretrain` of tests/tiny.yaml to its end."""
    run_largescale("pretrain", TINY, *overrides, ranks=ranks)


def _environment(store: dist.TCPStore | None, rank: int, ranks: int) -> dict[str, str]:
    """With what torchrun sets for each of several ranks."""
    if store is None:
        return environment()
    return {
        **environment(),
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank(entry: Callable[[], int], command: list[str], folder: str, environ: dict[str, str]) -> None:
    """The life of a forked process: from here on as if it were `python -m largescale COMMAND`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    sys.argv = ["largescale", *command]
    sys.exit(entry())


def _wait_for_all(processes: list[ForkServerProcess], deadline: float) -> int:
    """The exit code: 0, or that of the first that failed."""
    code, running = 0, list(processes)
    while running and wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode and not code:
                code, deadline = process.exitcode, time.monotonic() + _GRACE_S
                for other in running:
                    other.terminate()
    for process in running:
        process.kill()
        process.join()
    assert code or not running, "ranks did not end in time"
    return code
