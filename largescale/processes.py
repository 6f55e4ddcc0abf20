"""This process among the others: rank, world size, device, and the process group's life."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from shards.errors import InputError


def rank() -> int:
    """This process's number, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks. Collectives: every rank must call it."""
    if dist.is_initialized():
        dist.barrier()


def on_rank_0(action: Callable[[], None]) -> None:
    """Do something on rank 0 alone; where that is a user's mistake, all ranks say so.

    Raises:
        InputError: `action` did.

    Collectives: every rank must call it; one broadcast of an object.
    """
    failure = [""]
    if rank() == 0:
        try:
            action()
        except (InputError, OSError) as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise InputError(failure[0])


def together(action: Callable[[], None]) -> None:
    """Do something on every rank; where that is a user's mistake on any of them, all ranks say so.

    Raises:
        InputError: `action` did, here or elsewhere.

    Collectives: every rank must call it; one all-gather of objects.
    """
    failure = ""
    try:
        action()
    except (InputError, OSError) as error:
        failure = str(error)
    failures: list[str] = [""] * world_size()
    dist.all_gather_object(failures, failure)
    if found := next(filter(None, failures), ""):
        raise InputError(found)


@contextmanager
def process_group(hang_timeout_s: float = 0) -> Iterator[torch.device]:
    """Join the processes that torchrun or srun started (or be the only one) and leave in order; yields the device.

    Args:
        hang_timeout_s: of the watchdog; collectives give up after twice that, so that it speaks first.

    NCCL where GPUs are, gloo on CPU. A process that fails leaves at once: waiting for the others would hang.
    """
    os.environ.update(slurm_ranks(os.environ))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # new and old name; for the watchdog
            os.environ.setdefault(name, "2000")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=max(1800.0, 2 * hang_timeout_s))
    if "RANK" in os.environ:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(start_id(), store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def start_id() -> str:
    """Names this start of the ranks: torchrun may keep its store over restarts, with addresses of the dead in it."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a process that srun started; nothing for any other process.

    The ranks of a step meet on its first node, at a port that follows from the job and step, so that two jobs on one
    node do not meet each other. MASTER_ADDR and MASTER_PORT may be set beforehand.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return {}
    on_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 8(x16)
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        **({"LOCAL_WORLD_SIZE": on_node.group()} if on_node else {}),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_address(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (job * 16 + step) % 40000),
    }


def _first_address(nodes: str) -> str:
    """The address of the first node of a list, as SLURM itself reaches it; its name where SLURM cannot be asked."""

    def ask(*what: str) -> str:
        command = ["scontrol", "show", *what]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        first = ask("hostnames", nodes).split()[0]
        address = re.search(r"\bNodeAddr=(\S+)", ask("node", first))
    except (FileNotFoundError, subprocess.SubprocessError):
        return nodes.split(",")[0]
    return address.group(1) if address else first
