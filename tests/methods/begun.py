"""Methods that are ready to train, views without a stream and phases over all images, for tests of methods that keep
state by sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from largescale.config import load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import build_method, require_fit
from largescale.methods.method import Method
from largescale.methods.phase import PlainEmbeddings

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


def plain_images(samples: int) -> Tensor:
    """Of independent normal pixels, [samples, 3, 24, 24]; always the same."""
    return torch.randn(samples, 3, 24, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def coloured_images(samples: int) -> tuple[Tensor, Tensor]:
    """Images of four colours with a little noise, [samples, 3, 24, 24], and the number of each one's colour."""
    colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [-2, -2, -2]], dtype=torch.float64)
    known = torch.arange(samples) % 4
    noise = torch.randn(samples, 3, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return colours[known][:, :, None, None] + 0.05 * noise, known


@torch.no_grad()
def phase_over(method: Method, images: Tensor, *, missing: int = -1, step: int = 0) -> dict[str, float]:
    """A phase over images, of which one cannot be read."""
    readable = torch.arange(len(images)) != missing
    return method.phase(step, PlainEmbeddings(method.plain(images[readable]), readable), lambda what: None)


def take_state(method: Method, other: Method) -> None:
    """Give one method what a checkpoint would hold of the state of another."""
    mesh = init_device_mesh("cpu", (1,))
    for name, value in other.state(mesh).items():
        method.state(mesh)[name].to_local().copy_(value.to_local())


def sizes_of(calls: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Collectives that were counted, sorted, without the form in which they were called."""
    return sorted((name.partition("_single")[0].partition("_into")[0], size) for name, size in calls)
