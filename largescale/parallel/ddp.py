"""DDP: whole parameters on every rank, gradients averaged in buckets behind the backward pass.

One rank by itself on a CPU has nobody to average with, and is spared the copies into buckets, 3% of a small step. On a
GPU, whose memory a plan tells by them, they stay.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from largescale.config import Config
from largescale.methods.method import Method
from largescale.optim.optimizers import build_optimizer
from largescale.parallel.engine import Engine
from largescale.parallel.precision import AUTOCAST
from largescale.processes import world_size

# BatchNorm statistics are equal on all ranks (or averaged when saved), so nothing is broadcast in the steps.
# torch 2.14 renames the option; earlier versions have the old name alone.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


class DDPEngine(Engine):
    """Whole copies; gradients are averaged in buckets behind the backward pass."""

    wrapped: DistributedDataParallel

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.wrapped.no_sync()


def spares_buckets(device: torch.device) -> bool:
    """Whether this process is one rank by itself on a CPU."""
    return world_size() == 1 and device.type == "cpu"


def build(method: Method, config: Config, device: torch.device) -> Engine:
    """Wrap a method in DDP. Collectives: every rank must call it; rank 0's weights are sent to all."""
    parts: dict[str, Any] = {
        "method": method,
        "config": config,
        "device": device,
        "autocast_dtype": AUTOCAST.get(config.train.precision),
    }
    if spares_buckets(device):
        return Engine(wrapped=method, optimizer=build_optimizer(method, method.roles(), config.optim), **parts)
    # torch remarks that a 1x1 convolution has two equal layouts; nothing is to be done about it.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # Of several objectives of a step, each leaves what it does not depend on without a gradient.
    options: dict[str, Any] = {_SYNC_BUFFERS: False, "find_unused_parameters": len(method.objectives) > 1}
    wrapped = DistributedDataParallel(
        method, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True, **options
    )
    return DDPEngine(wrapped=wrapped, optimizer=build_optimizer(method, method.roles(), config.optim), **parts)
