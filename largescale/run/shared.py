"""Checks that `run.dir` is the same folder for all ranks: what one of them writes, the others must see."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from largescale.processes import rank, world_size
from shards.ground.errors import InputError

_PATIENCE_S = 10.0
"""Time for network file systems, which may show a new file late."""
_NAMED_RANKS = 4


def check_shared(run_dir: Path) -> None:
    """Make sure that all ranks share the run's folder, created if needed.

    Raises:
        InputError: a rank cannot write there, or has another folder of that name; names rank, host and path.

    Collectives: those of `unshared`.
    """
    if complaint := unshared(run_dir):
        raise InputError(complaint)


def unshared(run_dir: Path, patience_s: float = _PATIENCE_S) -> str:
    """What keeps the ranks from sharing the run's folder; empty if nothing does, and the same on all ranks.

    Every rank leaves a file there: rank 0 looks for those of all others, the others for that of rank 0.

    Collectives: every rank must call it; a broadcast and two all-gathers of objects.
    """
    if world_size() == 1:
        return ""
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0)
    # Not named as what a run that starts there just now removes: see `remove_partial_files`.
    probes = [run_dir / f".shared-{token[0]}-{number:05d}" for number in range(world_size())]
    where = f"rank {rank()} on {socket.gethostname()}"
    complaint = ""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probes[rank()].touch()
    except OSError as error:
        complaint = f"{where} cannot write to {run_dir.absolute()} ({error.strerror})"
    complaints = [text for text in _gather(complaint) if text]
    unseen: list[int] = []
    if not complaints:
        unseen = _unseen(probes if rank() == 0 else probes[:1], patience_s)
    facts = _gather((f"{where} has {run_dir.absolute()}", unseen))  # after this no rank looks for files any more
    with suppress(OSError):
        probes[rank()].unlink()
        run_dir.rmdir()  # only succeeds if empty
    if complaints:
        return "; ".join(complaints[:_NAMED_RANKS])
    apart = sorted({number for number, (_, missing) in enumerate(facts) if missing} | set(facts[0][1]))
    apart = [number for number in apart if number > 0]
    if not apart:
        return ""
    named = "; ".join(facts[number][0] for number in [0, *apart[:_NAMED_RANKS]])
    more = f"; {len(apart) - _NAMED_RANKS} more ranks" if len(apart) > _NAMED_RANKS else ""
    return (
        f"run.dir={run_dir}: the ranks do not share it ({named}{more}); put it on a file system that all nodes "
        f"share, and pass its absolute path"
    )


def _unseen(probes: list[Path], patience_s: float) -> list[int]:
    """Positions in a list of files that do not show up."""
    deadline = time.monotonic() + patience_s
    while True:
        missing = [place for place, probe in enumerate(probes) if not probe.exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        with suppress(OSError):
            os.listdir(probes[0].parent)  # some network file systems then ask their server again
        time.sleep(0.2)


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
