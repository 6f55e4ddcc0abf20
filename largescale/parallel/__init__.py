"""Parallel strategies, one file each behind the interface of `engine.Engine`. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from largescale.config import Config
from largescale.methods.swav import SwAV
from largescale.parallel import ddp, fsdp
from largescale.parallel.batchnorm import synchronize_batchnorm
from largescale.parallel.engine import Engine
from shards.errors import InputError

STRATEGIES: dict[str, Callable[[SwAV, Config, torch.device], Engine]] = {"ddp": ddp.build, "fsdp": fsdp.build}


def build_engine(method: SwAV, config: Config, device: torch.device) -> Engine:
    """Move a method to the device in the run's precision and wrap it as `parallel.strategy` says.

    Raises:
        InputError: for an unknown strategy.

    Collectives: every rank must call it.
    """
    strategy = config.parallel.strategy
    if strategy not in STRATEGIES:
        raise InputError(f"parallel.strategy={strategy}: expected one of {', '.join(STRATEGIES)}")
    if config.parallel.sync_batchnorm:
        synchronize_batchnorm(method, device)
    method.to(device, torch.float64 if config.train.precision == "fp64" else torch.float32)
    return STRATEGIES[strategy](method, config, device)
