"""This process among the others: rank, world size, device, and the life of the process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from largescale.distributed import threads
from largescale.distributed.launch import Launch, begin_group, own_launch
from largescale.distributed.rendezvous import join
from largescale.distributed.stopping import StoppedWaiting
from shards.ground.errors import InputError, line_of

Value = TypeVar("Value")

_JOIN_S, _JOIN_NODES_S = 50.0, 300.0
"""Ranks on one node start within seconds of each other. On several nodes, each reads its libraries from a file system
that all share; with a cold cache that takes minutes, longer on some nodes than on others."""
_WAIT_S = 900.0
"""Time without progress in commands that have no watchdog; see `collective_timeout`."""
_AFTER_OWNER_S = 1800.0
"""An owner that falls silent at the end of the wait for it is watched for the time of its lease as well."""
_FOREVER_S = 2e6
"""In milliseconds it fits the 32 bits that a wait for a socket has."""


def rank() -> int:
    """This process's rank, 0 if there is only one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks. Collectives: every rank must call it."""
    if dist.is_initialized():
        dist.barrier()


def from_rank_0(value: Value) -> Value:
    """What rank 0 passes, on every rank. Collectives: every rank must call it; one broadcast of an object."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_rank_0(action: Callable[[], Value]) -> Value:
    """Do something only on rank 0 and return on every rank what came of it; if it raises InputError or StoppedWaiting,
    all ranks do.

    Raises:
        InputError, StoppedWaiting: `action` did.

    Collectives: every rank must call it; one broadcast of an object.
    """
    if not dist.is_initialized():
        return action()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found = [action(), None]
        except StoppedWaiting as error:
            found = [None, error]
        except (InputError, OSError) as error:
            found = [None, InputError(line_of(error))]
    dist.broadcast_object_list(found, src=0)
    value, failure = found
    if failure:
        raise failure
    return cast(Value, value)


def together(action: Callable[[], Value]) -> Value:
    """Do something on every rank and return what came of it here; if it raises InputError on one, all ranks do.

    Raises:
        InputError: `action` did, here or elsewhere.

    Collectives: every rank must call it; one all-gather of objects.
    """
    if not dist.is_initialized():
        return action()
    failure, found = "", []
    try:
        found.append(action())
    except (InputError, OSError) as error:
        failure = line_of(error)
    failures: list[str] = [""] * world_size()
    dist.all_gather_object(failures, failure)
    if first := next(filter(None, failures), ""):
        raise InputError(first)
    return found[0]


def collective_timeout(hang_timeout_s: float, owner_wait_s: float = 0) -> timedelta:
    """After which a collective gives up: twice the watchdog's time, so that the watchdog reports first; without a
    watchdog (0) after weeks. Never before rank 0 has waited `owner_wait_s` for a folder, which the others wait for.
    """
    longest_s = max(1800.0, 2 * hang_timeout_s, owner_wait_s + _AFTER_OWNER_S)
    return timedelta(seconds=longest_s if hang_timeout_s else _FOREVER_S)


@contextmanager
def process_group(
    hang_timeout_s: float = _WAIT_S, join_timeout_s: float = 0, loading: int = 0, owner_wait_s: float = 0
) -> Iterator[torch.device]:
    """Join the processes that torchrun or srun started (or be the only one) and leave in order; yields the device.

    Args:
        hang_timeout_s: of the watchdog, 0 for none; see `collective_timeout`.
        join_timeout_s: time for all ranks to join; 0 uses `join_time_s`.
        loading: processes and threads that this rank is going to load data with.
        owner_wait_s: for how long rank 0 may wait for a run's folder while the others wait for it.

    NCCL on GPUs, gloo on CPUs. A process that fails exits at once: waiting for the others would hang.

    Raises:
        InputError: the environment contradicts itself, not all ranks meet, or too few threads may be started; the
            message says which.
        StoppedWaiting: a signal asked to stop while this rank waited for others.
    """
    launch = own_launch()
    device = _device(launch)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = collective_timeout(hang_timeout_s, owner_wait_s)
    more = threads.COMMAND + threads.GROUPS + threads.of_math() + loading
    room = threads.allowed(more, "lower data.workers or data.threads" if loading > 1 else "")
    if launch is None:
        with room:
            pass
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        begin_group()
        with room:  # until all ranks are there, and hold theirs
            store = join(launch, timeout_s=join_timeout_s or join_time_s(launch), uses=_name(device))
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _device(launch: Launch | None) -> torch.device:
    """The GPU of this rank: the one with its number on the node, or the only one its launcher lets it see."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Where each task sees GPUs of its own, they are counted from 0 in each; that two ranks do not share one is checked
    # when they have met.
    device = torch.device("cuda", (launch.local_rank if launch else 0) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # new and old name; for the watchdog
        os.environ.setdefault(name, "2000")
    return device


def join_time_s(launch: Launch) -> float:
    """Default time for all ranks to join."""
    several_nodes = 0 < launch.local_ranks < launch.world_size
    return _JOIN_NODES_S if several_nodes else _JOIN_S


def _name(device: torch.device) -> str:
    """Identifies a GPU among all others; empty for a CPU, which ranks share."""
    if device.type != "cuda":
        return ""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return name_of_gpu(uuid, device.index, os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def name_of_gpu(uuid: str, index: int, visible: str) -> str:
    """The UUID of a GPU, or of a slice of one (MIG): before CUDA 13 all slices are told that of the GPU they are of."""
    entries = [entry.strip() for entry in visible.split(",")]
    return entries[index] if index < len(entries) and entries[index].startswith("MIG-") else uuid
