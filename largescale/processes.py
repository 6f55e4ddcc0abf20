"""This process among the others: rank, world size, device, and the process group's life."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


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


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started (or be the only one) and leave in order; yields the device.

    NCCL where GPUs are, gloo on CPU. A process that fails leaves at once: waiting for the others would hang.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()
