"""Methods that hear, and views of noise that has a sound."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.method import Method

BATCH = 6
M = TypeVar("M", bound=Method)


def hearing_method(kind: type[M], recipe: Path, *overrides: str) -> M:
    """The method of a recipe, of seed 0, for batches of `sounding_views`."""
    config = load_config(recipe, [f"train.global_batch={BATCH}", "data.streams=1", *overrides])
    torch.manual_seed(0)
    method = build_method(config, Length(18, 3, 40))
    assert isinstance(method, kind)
    return method


def sounding_views() -> Views:
    """Two crop groups, of 24 and 16 px; one sample comes twice."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64) for side in (24, 16)]
    sounds = torch.randint(-9000, 9000, (BATCH, 200), generator=generator, dtype=torch.int16)
    return Views(images, torch.tensor([3, 7, 3, 1, 0, 9]), sounds=sounds)
