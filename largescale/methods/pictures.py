"""What a task makes of images, as pictures beside each other in the report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from largescale.config import Config
from largescale.data.task_views.lab import grey_of
from largescale.methods.float32 import at_least_float32

_WHITE = 1.0


@dataclass(frozen=True)
class Pictures:
    """A gallery in the report with a row of pictures for each image; `Method.draw` makes them.

    Attributes:
        title: above it.
        about: what it shows, as a sentence.
        columns: what the pictures of a row are, in two or three words each.
    """

    title: str
    about: str
    columns: tuple[str, ...]


def in_range(images: Tensor, config: Config) -> Tensor:
    """Normalised images [B, 3, H, W] with intensities in [0, 1] again, in float32 at least; what lies beyond is cut."""
    x = at_least_float32(images)
    pairs = zip(config.data.mean, config.data.std, strict=True)
    return torch.stack([x[:, c] * std + mean for c, (mean, std) in enumerate(pairs)], dim=1).clamp_(0, 1)


def in_grey(images: Tensor, config: Config, dtype: torch.dtype) -> Tensor:
    """The grey images of the lightness of images [B, 3, H, W] in [0, 1], as networks see images: normalised, in three
    channels, channels last.
    """
    grey = grey_of(images)[:, 0]
    channels = [(grey - mean) / std for mean, std in zip(config.data.mean, config.data.std, strict=True)]
    return torch.stack(channels, dim=1).to(dtype, memory_format=torch.channels_last)


def laid_out(tiles: Tensor, gap: int = 2) -> Tensor:
    """Square tiles [B, T, 3, t, t] in rows of a square with a white gap between them: [B, 3, S, S]."""
    batch, count = tiles.shape[:2]
    side = round(count**0.5)
    framed = pad(tiles, (0, gap, 0, gap), value=_WHITE).unflatten(1, (side, side))
    whole = framed.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, side * framed.shape[-2], -1)
    return whole[..., : -gap or None, : -gap or None]
