"""The part of an image that is to be made, errors in it and what is watched of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from largescale.methods.float32 import at_least_float32


class Hole(NamedTuple):
    """What is to be made of images of S pixels.

    Attributes:
        wanted: bool [B, 1, S, S], pixels that count.
        hidden: bool [B, 1, S, S], those of them that are not seen; the others are the rim.
        side: R, of the square in the middle of the image that holds all of them.
    """

    wanted: Tensor
    hidden: Tensor
    side: int

    def hidden_in(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] with the mean in the place of hidden pixels."""
        return images.masked_fill(self.hidden, 0)

    def part_of(self, images: Tensor) -> Tensor:
        """The square of images or masks: [B, ..., S, S] to [B, ..., R, R]."""
        first = (images.shape[-1] - self.side) // 2
        return images[..., first : first + self.side, first : first + self.side]

    def filled(self, whole: Tensor, made: Tensor) -> Tensor:
        """The square [B, 3, R, R] of images, with what is made where it is wanted."""
        return torch.where(self.part_of(self.wanted), made, whole)


def hole_loss(made: Tensor, wanted: Tensor, hole: Hole, rim_weight: float) -> Tensor:
    """The mean over images of the mean, over the pixels that count, of weighted squares; a scalar.

    The naive loop::

        for i in images:
            for p in pixels that count, for c in channels:
                loss += (1 if p is hidden else rim_weight) * (made[i, c, p] - wanted[i, c, p]) ** 2 / pixels / 3 / B

    Args:
        made, wanted: [B, 3, R, R].
        hole: what counts.
        rim_weight: of pixels that are seen; arXiv 1604.07379, section 3.3, has 10.
    """
    square = (at_least_float32(made) - at_least_float32(wanted)).square().mean(1, keepdim=True)
    hidden, counts = hole.part_of(hole.hidden), hole.part_of(hole.wanted)
    weights = torch.where(hidden, 1.0, rim_weight) * counts
    return ((square * weights).flatten(1).sum(1) / counts.flatten(1).sum(1)).mean()


@torch.no_grad()
def hole_signs(made: Tensor, wanted: Tensor, hole: Hole) -> dict[str, Tensor]:
    """Means over images of means over their hidden pixels: `hole_error`, that of squares of what is wrong, and
    `hole_mean` and `hole_square` [3], of pixels and their squares; `rim_error`, the first over the rim.
    """
    made, wanted = at_least_float32(made), at_least_float32(wanted)
    hidden = hole.part_of(hole.hidden)
    square, rim = (made - wanted).square(), hole.part_of(hole.wanted) & ~hidden
    return {
        "hole_error": _mean_in(square, hidden).mean(),
        "rim_error": _mean_in(square, rim).mean(),
        "hole_mean": _mean_in(wanted, hidden),
        "hole_square": _mean_in(wanted.square(), hidden),
    }


def _mean_in(values: Tensor, where: Tensor) -> Tensor:
    """Of each channel, [3]; 0 for an image that has no such pixel."""
    counts = where.sum((2, 3)).clamp_min(1)
    return ((values * where).sum((2, 3)) / counts).mean(0)
