"""Parallel strategies, one file each behind the interface of `engine.Engine`. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from largescale.config import Config
from largescale.config.setting import a_name
from largescale.methods.method import Method
from largescale.models.compile import compile_blocks
from largescale.models.recompute import recompute_activations
from largescale.models.small_maps import multiply_small_maps
from largescale.parallel import ddp, fairscale, fsdp, zero
from largescale.parallel.batchnorm import batchnorm_group, synchronize_batchnorm
from largescale.parallel.engine import Engine
from largescale.parallel.precision import weights_dtype
from shards.ground.errors import InputError

STRATEGIES: dict[str, Callable[[Method, Config, torch.device], Engine]] = {
    "ddp": ddp.build,
    "fsdp": fsdp.build,
    "zero1": partial(zero.build, stage=1),
    "zero2": partial(zero.build, stage=2),
    "zero3": partial(zero.build, stage=3),
    "fairscale": fairscale.build,
}


def build_engine(method: Method, config: Config, device: torch.device) -> Engine:
    """Move a method to the device in the run's precision and wrap it as `parallel.strategy` says.

    Raises:
        InputError: for an unknown strategy, or one whose library is missing; sizes that do not fit the ranks.

    Collectives: every rank must call it.
    """
    strategy = config.parallel.strategy
    if strategy not in STRATEGIES:
        raise InputError(f"parallel.strategy={strategy}: expected {a_name(strategy, STRATEGIES)}")
    prepare(method, config, device)
    if device.type == "cpu":
        multiply_small_maps(method)
    if config.parallel.sharded_init and strategy != "fsdp":
        raise InputError(f"parallel.sharded_init: is for parallel.strategy=fsdp, not {strategy}; leave it out")
    method.to(None if config.parallel.sharded_init else device, weights_dtype(config))
    engine = STRATEGIES[strategy](method, config, device)
    engine.follow(momentum=0.0)
    return engine


def prepare(method: Method, config: Config, device: torch.device) -> None:
    """What is done to a method before any strategy wraps it: BatchNorm over ranks, compilation, recomputation.

    Collectives: every rank must call it; it makes the groups of BatchNorm.
    """
    if config.parallel.sync_batchnorm:
        synchronize_batchnorm(method, device, batchnorm_group(config))
    compile_blocks(method.backbone, config.model.compile_stages)
    recompute_activations(method.backbone, config.model.recompute_stages)
