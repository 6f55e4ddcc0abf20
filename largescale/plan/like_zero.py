"""DeepSpeed's ZeRO in a plan: the adapter of `largescale.parallel.zero` around a stand-in of its stage."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from largescale.config import Config
from largescale.methods.method import Method
from largescale.optim.optimizers import build_optimizer
from largescale.parallel import zero
from largescale.parallel.engine import Engine
from largescale.plan.like_zero3 import Zero3
from largescale.plan.like_zero12 import Zero12
from shards.ground.errors import InputError


class _Engine(zero.ZeroEngine):
    """The adapter's, but that all parameters of stage 3 look gathered here."""

    def pieces(self, parameter: Tensor) -> list[Tensor]:
        """The tensors that stand for a parameter: under stage 3 its gathered copies."""
        return self.wrapped.copies(parameter) if isinstance(self.wrapped, Zero3) else super().pieces(parameter)


def build(method: Method, config: Config, device: torch.device, fake: FakeTensorMode, *, stage: int) -> Engine:
    """As `zero.build`, which this follows line by line, without DeepSpeed.

    Raises:
        InputError: a precision that it cannot train in.
    """
    if config.train.precision not in zero.PRECISIONS:
        raise InputError(
            f"train.precision={config.train.precision}: parallel.strategy=zero{stage} trains in fp32, tf32 or bf16"
        )
    zero.autocast_inside(method, config, device)
    optimizer = build_optimizer(method, method.roles(), config.optim)
    settings = zero.deepspeed_config(config, stage, method)["zero_optimization"]
    with fake:
        wrapped = (
            Zero3(method, optimizer, config.train.accumulate, settings)
            if stage == 3
            else Zero12(method, optimizer, stage, config.train.accumulate, settings)
        )
    return _Engine(
        stage=stage, offload=False, wrapped=wrapped, method=method, optimizer=optimizer, config=config, device=device
    )
