"""What torchrun or srun told this process about its ranks."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from shards.ground.errors import InputError

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM's step numbers from here on belong to batch scripts and interactive shells, which srun did not start."""


@dataclass(frozen=True)
class Launch:
    """What a launcher told one rank of several.

    Attributes:
        rank, world_size: its number, and how many there are.
        local_rank, local_ranks: the same on this node; `local_ranks` is 0 if not known.
        address, port: where the ranks meet, on the machine of rank 0.
    """

    rank: int
    world_size: int
    local_rank: int
    local_ranks: int
    address: str
    port: int

    @property
    def place(self) -> str:
        """Where the ranks meet, in words."""
        return f"MASTER_ADDR={self.address} MASTER_PORT={self.port}"


@cache
def own_launch() -> Launch | None:
    """`launch_of` the environment this process was started with; libraries change it later.

    Raises:
        InputError: as it and `slurm_ranks` do.
    """
    os.environ.update(slurm_ranks(os.environ))
    return launch_of(os.environ)


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """What torchrun (or `slurm_ranks`) set in the environment; None for a single process.

    MASTER_ADDR and MASTER_PORT alone do not make ranks: job scripts export them for everything they start.

    Raises:
        InputError: a variable is missing, or not what it should be.
    """
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1":
        return None
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environment:
            raise InputError(
                f"{other}={environment[other]} is set in the environment but {name} is not: start several ranks with "
                f"torchrun or srun, which set both; for a single process, unset {other}"
            )
    rank, world_size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    if rank >= world_size:
        raise InputError(f"RANK={rank}: expected less than WORLD_SIZE={world_size}; ranks are counted from 0")
    if world_size == 1:
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise InputError(
                f"{name} is not set but WORLD_SIZE={world_size} is: name the host of rank 0 and a free "
                f"port there, or start the ranks with torchrun"
            )
    port = _number(environment, "MASTER_PORT", 1)
    if port > 65535:
        raise InputError(f"MASTER_PORT={port}: expected a port from 1 to 65535")
    return Launch(
        rank,
        world_size,
        _number(environment, "LOCAL_RANK", 0),
        _number(environment, "LOCAL_WORLD_SIZE", 0),
        environment["MASTER_ADDR"],
        port,
    )


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = environment.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text!r} in the environment: expected a whole number, at least {least}")
    return int(text)


_groups = itertools.count(1)
_group = 0


def begin_group() -> None:
    """Give the group that is about to be joined an id of its own; every rank joins equally often."""
    global _group
    _group = next(_groups)


def start_id() -> str:
    """Names this start of the ranks, and their group: torchrun may keep its store over restarts, and a command that
    joins one group after the other keeps it too, with addresses of dead ones in it.

    Each node's torchrun counts restarts of its own, so that several nodes may not agree on a count; in a store that
    rank 0 opens, which is new at every start, they need none.
    """
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{count}"
    return f"{start}/{_group}" if _group > 1 else start


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a process started by srun; nothing for other processes.

    The ranks of a step meet on its first node, at a port that follows from the job and step, so that two jobs on one
    node do not meet each other. MASTER_ADDR and MASTER_PORT may be set beforehand.

    Raises:
        InputError: srun set only a part of its variables.
    """
    tasks, step_id = environment.get("SLURM_STEP_NUM_TASKS", "1"), environment.get("SLURM_STEP_ID", "")
    if "RANK" in environment or tasks == "1" or not step_id.isdecimal() or int(step_id) >= _FIRST_SPECIAL_STEP:
        return {}
    on_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 8(x16)
    try:
        job, step = int(environment["SLURM_JOB_ID"]), int(step_id)
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": tasks,
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            **({"LOCAL_WORLD_SIZE": on_node.group()} if on_node else {}),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_address(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (job * 16 + step) % 40000),
        }
    except (KeyError, ValueError) as error:
        raise InputError(
            f"SLURM_STEP_NUM_TASKS={tasks} is set in the environment, but not everything else that srun "
            f"sets ({error}): start ranks with srun, or unset it for a single process"
        ) from error


def _first_address(nodes: str) -> str:
    """The address of the first node in a list, as SLURM itself reaches it; its name if SLURM cannot be asked."""

    def ask(*what: str) -> str:
        command = ["scontrol", "show", *what]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        first = ask("hostnames", nodes).split()[0]
        address = re.search(r"\bNodeAddr=(\S+)", ask("node", first))
    except (FileNotFoundError, subprocess.SubprocessError):
        return nodes.split(",")[0]
    return address.group(1) if address else first
