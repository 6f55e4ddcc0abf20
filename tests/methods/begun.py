"""Methods that are ready to train, and views without a stream, for tests of methods that keep state by sample."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method, require_fit
from largescale.methods.method import Method

M = TypeVar("M", bound=Method)


def begun(kind: type[M], recipe: Path, batch: int, length: Length, *overrides: str) -> M:
    """The method of a recipe, of seed 0, in float64, with room for its state."""
    config = load_config(recipe, [f"train.global_batch={batch}", "data.streams=1", *overrides])
    torch.manual_seed(0)
    require_fit(config, length)
    method = build_method(config, length).double()
    assert isinstance(method, kind)
    method.begin()
    return method


def random_views(batch: int, step: int, samples: int, *groups: tuple[int, int]) -> Views:
    """Views of crop groups (number, side), of samples that are drawn among so many; other ones in each step."""
    generator = torch.Generator().manual_seed(step)
    images = [torch.randn(num * batch, 3, side, side, generator=generator, dtype=torch.float64) for num, side in groups]
    return Views(images, torch.randint(samples, (batch,), generator=generator))
