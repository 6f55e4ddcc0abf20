"""How much memory a rank could use on this machine if it started again now."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

from largescale.distributed.control_groups import folders

_FOR_THE_SYSTEM = 0.1
"""Fraction of a machine's memory that ranks leave free."""

_NO_LIMIT = 2**60
"""Control groups without a limit report about this size."""


def gpu_bytes() -> int:
    """Memory of this rank's GPU, without what other processes hold."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@dataclass(frozen=True)
class Footprint:
    """Host memory of a process: resident bytes, and bytes of address space."""

    held: int
    mapped: int


def footprint(pid: int | str = "self") -> Footprint:
    """The present footprint of a process; zeros without /proc."""
    try:
        return Footprint(*(_bytes_of(f"/proc/{pid}/status", name) for name in ("VmRSS", "VmSize")))
    except OSError:
        return Footprint(0, 0)


def host_bytes(local_ranks: int, start: Footprint) -> int:
    """Host memory that one of `local_ranks` ranks could use beyond its size at `start`; freed memory may not show."""
    freed = footprint().held - start.held
    total, free = (_bytes_of("/proc/meminfo", name) for name in ("MemTotal", "MemAvailable"))
    # Other ranks may still hold their memory, or have freed it already: neither bound may be exceeded.
    found = [free + freed, total * (1 - _FOR_THE_SYSTEM) / local_ranks - start.held]
    found += [limit / local_ranks - start.held for limit in _control_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        found.append(limit - start.mapped)
    return max(0, int(min(found)))


def _bytes_of(path: str, name: str) -> int:
    with open(path) as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _control_groups() -> Iterator[int]:
    """Memory limits of this process's control groups, versions 1 and 2."""
    for folder in folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):
                if (limit := int((folder / name).read_text())) < _NO_LIMIT:
                    yield limit
    if job := os.environ.get("SLURM_MEM_PER_NODE"):  # in MB, for where SLURM kills and no control group limits
        with suppress(ValueError):
            yield int(job) * 2**20
