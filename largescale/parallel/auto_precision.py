"""What `train.precision=auto` stands for: on a device, and on all ranks of a run."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from largescale.config import Config
from largescale.parallel.strategies import STRATEGIES

_RISING = ("fp32", "fp16", "bf16")
"""What devices compute in: not on CUDA, on GPUs before Ampere (which emulate bf16), and on later ones."""


def of_device(config: Config, device: torch.device) -> Config:
    """The configuration with `train.precision=auto` replaced by what this device alone would take."""
    return _with(config, _capability(device)) if config.train.precision == "auto" else config


def of_ranks(config: Config, device: torch.device) -> Config:
    """The configuration with `train.precision=auto` replaced by what the devices of all ranks compute in, the same on
    every rank: gradients scaled for fp16 on some ranks alone could not be averaged.

    Collectives: every rank must call it; with auto, one all-reduce of a number in host memory.
    """
    if config.train.precision != "auto":
        return config
    lowest = torch.tensor(_capability(device))
    if dist.is_initialized():
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return _with(config, int(lowest))


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return 2 if torch.cuda.get_device_capability(device) >= (8, 0) else 1


def _with(config: Config, capability: int) -> Config:
    precision = _RISING[capability]
    if precision not in STRATEGIES[config.parallel.strategy].precisions:
        precision = "bf16"  # emulated, if need be: slower, but it trains
    return replace(config, train=replace(config.train, precision=precision))
