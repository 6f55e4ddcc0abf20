"""Numbers: precision of the computation, loss scaling for fp16, deterministic mode.

| train.precision | weights | convolutions and matrix products | BatchNorm, scores, loss |
|---|---|---|---|
| fp32 | fp32 | fp32 | fp32 |
| tf32 | fp32 | fp32 with TensorFloat-32 (CUDA) | fp32 |
| bf16 | fp32 | bf16 | fp32 |
| fp16 | fp32 | fp16, gradients scaled | fp32 |
| fp64 | fp64 | fp64 | fp64 |
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from largescale.config import Config
from largescale.processes import rank

_log = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision of the forward pass, where it is not that of the weights."""


def set_up(config: Config, device: torch.device) -> None:
    """Switch this process to the configuration's arithmetic."""
    tf32 = config.train.precision == "tf32"
    if tf32 and device.type != "cuda" and rank() == 0:
        _log.warning("train.precision=tf32 has no effect on the device %s, which computes in fp32", device.type)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.train.deterministic


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions and products in the precision of their numbers; afterwards as before.

    By default torch lets cuDNN's convolutions round to TensorFloat-32, and a run in the same process may have changed
    what holds.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def weights_dtype(config: Config) -> torch.dtype:
    """Precision of the stored weights."""
    return torch.float64 if config.train.precision == "fp64" else torch.float32


def views_dtype(config: Config) -> torch.dtype:
    """Precision in which views reach the network: that of its first convolution."""
    return AUTOCAST.get(config.train.precision, weights_dtype(config))


class LossScale:
    """A factor on the loss that keeps fp16 gradients from vanishing: halved when they overflow, doubled after a while.

    There is a smallest factor: a gradient that is not finite even then did not overflow because of the
    factor, and halving further would skip every step to come.

    Source: arXiv 1710.03740, section 3.2.
    """

    GROWTH_STEPS = 2000
    SMALLEST = 2.0**-8

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.numbers = torch.tensor([2.0**16 if enabled else 1.0, 0.0], dtype=torch.float64, device=device)
        """The factor, and good steps since it was last changed; part of the checkpoint."""

    @property
    def factor(self) -> Tensor:
        """The factor that losses are multiplied by, a scalar on the device."""
        return self.numbers[0]

    def can_shrink(self) -> bool:
        """Whether a smaller factor could prevent an overflow; reads one number back from the device."""
        return float(self.factor) > self.SMALLEST

    def step(self, overflowed: bool) -> None:
        """Adapt the factor to whether a step overflowed."""
        factor, good_steps = self.numbers.tolist()
        if overflowed:
            factor, good_steps = factor / 2, 0
        else:
            good_steps += 1
            if good_steps == self.GROWTH_STEPS:
                factor, good_steps = factor * 2, 0
        self.numbers.copy_(torch.tensor([factor, good_steps]))
