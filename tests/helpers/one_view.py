"""Methods of one view: built in float64, and views of random images."""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import Method, build_method
from tests.methods.harness import mini

BATCH, SIDE = 5, 24
M = TypeVar("M", bound=Method)


def random_views(batch: int = BATCH, seed: int = 0) -> Views:
    """Of images 0, 1, ... of independent normal pixels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Views([images], torch.arange(batch))


def built(kind: type[M], name: str, *overrides: str, steps_per_epoch: int = 1) -> M:
    """A method of its recipe of milliseconds, for a run of 8 steps."""
    torch.manual_seed(0)
    method = build_method(mini(name, *overrides), Length(8, steps_per_epoch, 40))
    assert isinstance(method, kind)
    return method.double()


def log_sigmoid(score: float) -> float:
    return -math.log(1 + math.exp(-score))
