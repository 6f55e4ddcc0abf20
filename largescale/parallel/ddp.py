"""DDP: whole parameters on every rank, gradients averaged in buckets behind the backward pass."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from largescale.config import Config
from largescale.methods.swav import SwAV
from largescale.optim import build_optimizer
from largescale.parallel.engine import Engine
from largescale.processes import world_size


def build(method: SwAV, config: Config, device: torch.device) -> Engine:
    """Wrap a method in DDP. Collectives: every rank must call it; rank 0's weights are sent to all."""
    # BatchNorm statistics are equal on all ranks (or averaged when saved), so nothing is broadcast in the steps.
    wrapped = DistributedDataParallel(
        method,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    return Engine(
        wrapped=wrapped,
        method=method,
        optimizer=build_optimizer(method, config.optim),
        mesh=init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",)),
        autocast_dtype=torch.bfloat16 if config.train.precision == "bf16" else None,
    )
