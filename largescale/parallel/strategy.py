"""What a strategy is, for the table of all: how it wraps a method, and what can be set of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from largescale.config import PRECISIONS, Config, ParallelConfig
from largescale.methods.method import Method
from largescale.parallel.engine import Engine


@dataclass(frozen=True)
class Strategy:
    """One entry of `STRATEGIES`.

    Attributes:
        build: wraps a method that has been prepared; every rank calls it.
        Settings: the keys under `parallel` that it has beside those of all.
        precisions: values of `train.precision` that it trains in.
    """

    build: Callable[[Method, Config, torch.device], Engine]
    Settings: type[ParallelConfig] = ParallelConfig
    precisions: tuple[str, ...] = PRECISIONS
