"""FSDP2: parameters, gradients and optimizer state sharded over all ranks (torch's `fully_shard`), or over a part of
them and replicated on the parts (HSDP, `parallel.replicate`).

Units, inside out: residual blocks of at least `parallel.unit_min_parameters`, then the whole method. In bf16 and fp16
two things stay in float32, each in a unit of its own: normalisation (BatchNorm's running statistics are float32 and do
not mix with bf16 weights in one unit), and modules whose parameters the method wants in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.config import Config
from largescale.config.setting import setting
from largescale.methods.method import Method
from largescale.models.backbones import BLOCKS, count_parameters
from largescale.models.initialise import materialise
from largescale.optim.optimizers import build_optimizer
from largescale.optim.roles import parameters_with
from largescale.parallel import offload
from largescale.parallel.engine import Engine
from largescale.parallel.precision import AUTOCAST
from largescale.processes import collective_timeout, world_size
from shards.ground.errors import InputError

_AS_STORED = MixedPrecisionPolicy(cast_forward_inputs=False)


@dataclass
class Settings(offload.Settings):
    """Keys under `parallel`."""

    replicate: int = setting(
        1,
        "Copies of the sharded model (HSDP); gradients are averaged over them. Neighbouring ranks share a copy, so "
        "that one copy can fit a node.",
        at_least=1,
        at_most=2**31,
        refused_elsewhere=True,
        free=True,
    )
    shard: int = setting(
        0, "Ranks that a copy is sharded over; 0 is all ranks / replicate.", at_least=0, at_most=2**31, free=True
    )
    reshard_after_forward: bool = setting(True, "Free gathered parameters after the forward pass.", free=True)
    unit_min_parameters: int = setting(
        2_000_000,
        "Gather blocks with fewer parameters with the whole model instead of one by one.",
        at_least=0,
        free=True,
    )
    sharded_init: bool = setting(
        False,
        "Never build the whole network on any rank: each draws only the pieces it holds. The weights differ "
        "from a whole draw, but are the same on any number of ranks.",
        refused_elsewhere=True,
        free=True,
    )


def settings(config: Config) -> Settings:
    """The group `parallel` with these keys, which every configuration has; other strategies leave them alone."""
    assert isinstance(config.parallel, Settings)
    return config.parallel


class FSDPEngine(Engine):
    """Parameters, gradients and optimizer state are sharded, block by block."""

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        # Until the last micro-batch gradients add up unsharded: memory for communication.
        sharded = cast(FSDPModule, self.wrapped)
        sharded.set_requires_gradient_sync(last)
        sharded.set_is_last_backward(last)
        return nullcontext()


def build(
    method: Method,
    config: Config,
    device: torch.device,
    make_real: Callable[[nn.Module, torch.device, int], None] = materialise,
) -> Engine:
    """Shard a method; one on the meta device gets its memory and weights then, from `make_real`.

    Raises:
        InputError: replicas that do not divide the ranks; offloading what is drawn in pieces.

    Collectives: every rank must call it.
    """
    # A change in place would cut a view that a method returns off from FSDP2's hooks; nothing changes it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mixed, ours = config.train.precision in AUTOCAST, settings(config)
    shared: dict[str, Any] = {"mesh": _mesh(config, device)}
    if ours.cpu_offload and ours.sharded_init:
        raise InputError("parallel.sharded_init: cannot be combined with parallel.cpu_offload; choose one")
    if ours.cpu_offload:
        shared["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    policy = _AS_STORED
    if mixed:
        policy = MixedPrecisionPolicy(AUTOCAST[config.train.precision], reduce_dtype=torch.float32)
    if mixed:
        for module in _float32_modules(method):
            fully_shard(module, mp_policy=_AS_STORED, **shared)
    for block in _units(method, ours.unit_min_parameters):
        if mixed:
            _shard_norms(block, shared)
        fully_shard(block, mp_policy=policy, reshard_after_forward=ours.reshard_after_forward, **shared)
    if mixed:
        _shard_norms(method, shared)
    # The rest stays gathered from forward to backward: freed, it would be gathered again at once.
    fully_shard(method, mp_policy=policy, **shared)
    if next(method.parameters()).is_meta:
        make_real(method, device, config.run.seed)
    optimizer = build_optimizer(method, method.roles(), config.optim)
    return FSDPEngine(wrapped=method, method=method, optimizer=optimizer, config=config, device=device)


def _mesh(config: Config, device: torch.device) -> DeviceMesh:
    ours, size = settings(config), world_size()
    replicate, shard = ours.replicate, ours.shard or size // max(1, ours.replicate)
    if replicate < 1 or replicate * shard != size:
        raise InputError(
            f"parallel.replicate={replicate} x parallel.shard={ours.shard}: expected {size} ranks in all; "
            f"choose a divisor of {size} as parallel.replicate and leave parallel.shard at 0"
        )
    if replicate == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    # Groups made here, since those that a mesh makes by itself give up after torch's default time.
    timeout = collective_timeout(config.run.hang_timeout_s)
    ranks = [list(range(start, start + shard)) for start in range(0, size, shard)]
    copies, _ = dist.new_subgroups_by_enumeration([list(same) for same in zip(*ranks, strict=True)], timeout=timeout)
    shards, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
    groups = [cast(dist.ProcessGroup, group) for group in (copies, shards)]  # every rank is in one of each
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _float32_modules(method: Method) -> list[nn.Module]:
    """The outermost modules all of whose parameters have a role in float32."""
    found: list[nn.Module] = []
    kept = {id(parameter) for parameter in parameters_with(method, method.roles(), "float32")}

    def visit(module: nn.Module) -> None:
        parameters = list(module.parameters())
        if parameters and all(id(parameter) in kept for parameter in parameters):
            found.append(module)
        else:
            for child in module.children():
                visit(child)

    if kept:
        visit(method)
    return found


def _units(method: nn.Module, min_parameters: int) -> list[nn.Module]:
    return [m for m in method.modules() if isinstance(m, BLOCKS) and count_parameters(m) >= min_parameters]


def _shard_norms(module: nn.Module, shared: dict[str, Any]) -> None:
    """Put the normalisations of a module that no inner unit has yet into one float32 unit: one gather for all."""
    kinds = _BatchNorm | nn.GroupNorm
    norms: list[nn.Module] = [m for m in module.modules() if isinstance(m, kinds) and not hasattr(m, "unshard")]
    if norms:
        fully_shard(norms, mp_policy=_AS_STORED, reshard_after_forward=False, **shared)
