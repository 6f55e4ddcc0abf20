"""FairScale: optimizer state and reduced gradients cut by whole parameters (OSS and ShardedDataParallel, ZeRO-2).

Each parameter has one owner: gradients are reduced to it, it updates the parameter and sends it to the others.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from largescale.config import Config
from largescale.methods.method import Method
from largescale.optim.optimizers import optimizer_recipe, pass_over_frozen_groups
from largescale.optim.roles import parameter_groups
from largescale.parallel.clipping import GradientPieces
from largescale.parallel.engine import Engine, state_keys
from largescale.parallel.precision import AUTOCAST
from shards.ground.errors import InputError


class FairScaleEngine(Engine):
    """`optimizer` is the one of this rank's own parameters; `oss` wraps it."""

    wrapped: Any  # FairScale has no types
    oss: Any

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.wrapped.no_sync()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.own_parameters() if p.grad is not None]

    def gradient_pieces(self) -> GradientPieces:
        gradients = self.gradients()
        return GradientPieces(list(range(len(gradients))), gradients, len(gradients), None)

    def gradient_replicas(self) -> int:
        return 1

    def own_parameters(self) -> list[Tensor]:
        """The parameters that this rank updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step_optimizer(self) -> None:
        for own, shared in zip(self.optimizer.param_groups, self.oss.param_groups, strict=True):
            shared.update({key: own[key] for key in ("lr", "frozen")})
        self.oss.step()
        self.oss.zero_grad(set_to_none=True)
        self.normalize_rows()

    def prepare_optimizer_state(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Make room for the state of this rank's own parameters alone."""
        own = {id(p) for p in self.own_parameters()}
        names = {name for name, p in self.method.named_parameters() if id(p) in own}
        super().prepare_optimizer_state(
            {
                f"optimizer.{name}.{key}": shapes[f"optimizer.{name}.{key}"]
                for name in names
                for key in state_keys(name, shapes)
            }
        )


def build(method: Method, config: Config, device: torch.device) -> Engine:
    """Wrap a method in ShardedDataParallel over an OSS. Collectives: every rank must call it.

    Raises:
        InputError: fairscale is not installed.
    """
    try:
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim import OSS
    except ImportError as error:
        raise InputError("parallel.strategy=fairscale: install FairScale with `pip install fairscale`") from error
    logging.getLogger("fairscale").setLevel(logging.WARNING)
    optimizer_class, options = optimizer_recipe(config.optim)
    oss = OSS(parameter_groups(method, method.roles(), config.optim), optim=optimizer_class, **options)
    pass_over_frozen_groups(oss.optim)
    wrapped = ShardedDataParallel(
        method,
        oss,
        broadcast_buffers=False,
        reduce_buffer_size=0,  # its buffers go wrong where a group is frozen first and free later
    )
    wrapped.refresh_trainable()  # else in the first forward pass, which may have no graph to put its hooks on
    engine = FairScaleEngine(
        wrapped=wrapped,
        method=method,
        optimizer=oss.optim,
        config=config,
        device=device,
        autocast_dtype=AUTOCAST.get(config.train.precision),
    )
    engine.oss = oss
    return engine
