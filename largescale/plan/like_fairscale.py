"""FairScale's OSS and ShardedDataParallel (0.4.13), as `largescale.parallel.fairscale` uses them: no reduce buffers.

Every parameter has one owner. Its gradient is reduced to the owner as soon as it is complete, the others drop it; after
the update each owner broadcasts its parameters, which lie in one flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from largescale.config import Config
from largescale.distributed.collectives import exchanging
from largescale.methods.method import Method
from largescale.optim.optimizers import optimizer_recipe, pass_over_frozen_groups
from largescale.optim.roles import parameter_groups
from largescale.parallel import fairscale
from largescale.parallel.engine import Engine
from largescale.parallel.precision import AUTOCAST
from largescale.plan.stand_in import StandIn, in_one_piece
from largescale.plan.trace import WAITED, WEIGHTS
from largescale.processes import world_size


class ShardedData(StandIn):
    """In the place of both, on the rank that owns most; `inner` is the optimizer of what it owns."""

    inner: torch.optim.Optimizer

    def __init__(self, method: Method, groups: list[dict[str, Any]]) -> None:
        super().__init__(method)
        self.param_groups = groups
        self.owners = owners(groups, world_size())
        sizes = [sum(p.numel() for p in self.owned_by(number)) for number in range(world_size())]
        self.rank = sizes.index(max(sizes))
        self.flats = {number: in_one_piece(self.owned_by(number), size) for number, size in enumerate(sizes) if size}
        self.synchronises = True
        for parameter in self.owners:
            parameter.register_post_accumulate_grad_hook(self._send)

    def owned_by(self, number: int) -> list[Tensor]:
        """The parameters whose gradients and optimizer state rank `number` keeps."""
        return [parameter for parameter, owner in self.owners.items() if owner == number]

    def own_groups(self) -> list[dict[str, Any]]:
        """The parameter groups with this rank's parameters alone."""
        return [
            {**group, "params": [p for p in group["params"] if self.owners[p] == self.rank]}
            for group in self.param_groups
        ]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this block, gradients accumulate on every rank and are not reduced to their owners."""
        self.synchronises = False
        try:
            yield
        finally:
            self.synchronises = True

    @torch.no_grad()
    def _send(self, parameter: Tensor) -> None:
        if not self.synchronises:
            return
        gradient = parameter.grad
        assert gradient is not None
        gradient.mul_(1 / world_size())
        with exchanging(WEIGHTS):
            dist.reduce(gradient, dst=self.owners[parameter])
        del gradient  # else it would still be held behind the next line
        if self.owners[parameter] != self.rank:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update this rank's parameters. Collectives: one broadcast per rank that owns any."""
        self.inner.step()
        with exchanging(WAITED):
            for number, flat in self.flats.items():
                dist.broadcast(flat, src=number)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, those of other ranks included."""
        for parameter in self.owners:
            parameter.grad = None


def owners(groups: list[dict[str, Any]], ranks: int) -> dict[Tensor, int]:
    """The rank of each parameter: the one that has least so far, in the order of the groups."""
    sizes, found = [0] * ranks, {}
    for group in groups:
        for parameter in group["params"]:
            found[parameter] = sizes.index(min(sizes))
            sizes[found[parameter]] += parameter.numel()
    return found


def build(method: Method, config: Config, device: torch.device, fake: FakeTensorMode) -> Engine:
    """The adapter's engine around the stand-in."""
    groups = parameter_groups(method, method.roles(), config.optim)
    optimizer_class, options = optimizer_recipe(config.optim)
    with fake:
        oss = ShardedData(method, groups)
        optimizer = optimizer_class(oss.own_groups(), **options)
    pass_over_frozen_groups(optimizer)
    oss.inner = optimizer
    engine = fairscale.FairScaleEngine(
        wrapped=oss,
        method=method,
        optimizer=optimizer,
        config=config,
        device=device,
        autocast_dtype=AUTOCAST.get(config.train.precision),
    )
    engine.oss = oss
    return engine
