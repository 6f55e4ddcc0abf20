"""Parallel strategies, one file each behind the interface of `engine.Engine`. A new one is a file and a line here."""

from __future__ import annotations

from functools import partial

import torch

from largescale.config import Config
from largescale.config.setting import a_name
from largescale.methods.method import Method
from largescale.models.compile import compile_blocks
from largescale.models.narrow import pick_in_narrow
from largescale.models.recompute import recompute_activations
from largescale.models.small_maps import multiply_small_maps
from largescale.parallel import ddp, fairscale, fsdp, offload, zero
from largescale.parallel.batchnorm import batchnorm_group, synchronize_batchnorm
from largescale.parallel.engine import Engine
from largescale.parallel.precision import weights_dtype
from largescale.parallel.strategy import Strategy
from largescale.processes import together
from shards.ground.errors import InputError

STRATEGIES = {
    "ddp": Strategy(ddp.build),
    "fsdp": Strategy(fsdp.build, fsdp.Settings),
    "zero1": Strategy(partial(zero.build, stage=1), offload.Settings, zero.PRECISIONS),
    "zero2": Strategy(partial(zero.build, stage=2), offload.Settings, zero.PRECISIONS),
    "zero3": Strategy(partial(zero.build, stage=3), offload.Settings, zero.PRECISIONS),
    "fairscale": Strategy(fairscale.build),
}


def build_engine(method: Method, config: Config, device: torch.device) -> Engine:
    """Move a method to the device in the run's precision and wrap it as `parallel.strategy` says.

    Raises:
        InputError: for an unknown strategy, or one whose library is missing; sizes that do not fit the ranks
            or the run.

    Collectives: every rank must call it.
    """
    strategy = config.parallel.strategy
    if strategy not in STRATEGIES:
        raise InputError(f"parallel.strategy={strategy}: expected {a_name(strategy, STRATEGIES)}")
    prepare(method, config, device)
    if device.type == "cpu":
        multiply_small_maps(method)
        pick_in_narrow(method)
    method.to(None if drawn_in_pieces(config) else device, weights_dtype(config))
    engine = STRATEGIES[strategy].build(method, config, device)
    engine.follow(momentum=0.0)
    together(method.begin)  # it may read files that one node lacks
    return engine


def drawn_in_pieces(config: Config) -> bool:
    """Whether a method comes without memory, on the meta device, and its strategy draws the weights."""
    return fsdp.settings(config).sharded_init


def prepare(method: Method, config: Config, device: torch.device) -> None:
    """What is done to a method before any strategy wraps it: BatchNorm over ranks, compilation, recomputation.

    Collectives: every rank must call it; it makes the groups of BatchNorm.
    """
    if config.parallel.sync_batchnorm:
        synchronize_batchnorm(method, device, batchnorm_group(config))
    compile_blocks(method.backbone, config.model.compile_stages)
    recompute_activations(method.backbone, config.model.recompute_stages)
