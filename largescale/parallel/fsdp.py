"""FSDP2: parameters, gradients and optimizer state sharded over all ranks (torch's `fully_shard`).

Units, inside out: residual blocks of at least `parallel.unit_min_parameters`, then the whole method. In bf16 two
things stay in float32, each in a unit of its own: BatchNorm, whose running statistics are float32 and do not mix
with bf16 weights in one unit, and the prototypes, whose cosines feed Sinkhorn.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.config import Config
from largescale.methods.swav import SwAV
from largescale.models.backbones import BLOCKS, count_parameters
from largescale.optim import build_optimizer
from largescale.parallel.engine import Engine
from largescale.processes import world_size

_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_AS_STORED = MixedPrecisionPolicy(cast_forward_inputs=False)


def build(method: SwAV, config: Config, device: torch.device) -> Engine:
    """Shard a method over all ranks. Collectives: every rank must call it."""
    mesh = init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    mixed = config.train.precision == "bf16"
    policy = _BF16 if mixed else _AS_STORED
    reshard = config.parallel.reshard_after_forward
    if mixed:
        fully_shard(method.prototypes, mesh=mesh, mp_policy=_AS_STORED)
    for block in _units(method, config.parallel.unit_min_parameters):
        if mixed:
            _shard_norms(block, mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    if mixed:
        _shard_norms(method, mesh)
    # The rest stays gathered from forward to backward: freed, it would be gathered again at once.
    fully_shard(method, mesh=mesh, mp_policy=policy)
    return Engine(wrapped=method, method=method, optimizer=build_optimizer(method, config.optim), mesh=mesh)


def _units(method: nn.Module, min_parameters: int) -> list[nn.Module]:
    return [m for m in method.modules() if isinstance(m, BLOCKS) and count_parameters(m) >= min_parameters]


def _shard_norms(module: nn.Module, mesh: DeviceMesh) -> None:
    """Put the BatchNorms of a module that no inner unit has yet into one float32 unit: one gather for all."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and not hasattr(m, "unshard")]
    if norms:
        fully_shard(norms, mesh=mesh, mp_policy=_AS_STORED, reshard_after_forward=False)
