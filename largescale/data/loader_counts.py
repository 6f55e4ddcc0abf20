"""How many processes and threads load the data of a rank."""

from __future__ import annotations

from largescale.config import DataConfig
from largescale.distributed.control_groups import usable_cpus
from largescale.distributed.launch import own_launch

_MAX_THREADS = 4
"""With more, the threads of a process only wait for the interpreter's lock."""


def counts_for(data: DataConfig, *, on_gpu: bool) -> tuple[int, int]:
    """Loader processes and threads of this rank; see `choose_counts`."""
    launch = own_launch()
    local_ranks = max(1, launch.local_ranks if launch else 1)
    return choose_counts(data.workers, data.threads, local_ranks=local_ranks, on_gpu=on_gpu)


def choose_counts(processes: int, threads: int, *, local_ranks: int, on_gpu: bool) -> tuple[int, int]:
    """Loader processes and threads per rank, chosen by the available CPUs where the configuration leaves them open.

    Args:
        processes: as configured, -1 to choose.
        threads: as configured, 0 to choose.
        local_ranks: ranks on this node, which share its CPUs.
        on_gpu: if not, training itself needs the CPUs, so one process with few threads loads.
    """
    cpus = max(1, usable_cpus() // local_ranks)
    usable = max(1, cpus - 1) if on_gpu else max(1, cpus // 4)
    if processes < 0:
        processes = -(-usable // (threads or _MAX_THREADS))
    if threads == 0:
        threads = max(1, min(_MAX_THREADS, usable // max(1, processes)))
    return processes, threads
