"""A convolutional autoencoder, and what repairs an image whose code is damaged (arXiv 1806.05024, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from largescale.models.heads import HeadConv2d

_SLOPE = 0.2


def code_side(side: int, widths: Sequence[int]) -> int:
    """Side of the code of images with a side in px."""
    return side >> (len(widths) - 1)


class Repair(nn.Module):
    """Residual blocks, one in front of each layer of a decoder that enlarges; where a code is whole they do nothing.

    Args:
        widths: of the decoder's layers.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                HeadConv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(_SLOPE, inplace=True),
                HeadConv2d(width, width, 3, padding=1),
            )
            for width in widths
        )

    def forward(self, number: int, maps: Tensor, dropped: Tensor) -> Tensor:
        """Maps [B, C, h, w] in front of a layer, changed where `dropped`, bool [B, 1, c, c], is true."""
        where = interpolate(dropped.to(maps.dtype), size=maps.shape[-2:])
        return maps + self.blocks[number](maps) * where


class ConvAutoencoder(nn.Module):
    """Convolutions that halve the side, and layers that enlarge it again by repetition.

    Args:
        widths: of maps, from the image to the code; one halving fewer than there are.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        kernels = [(3, widths[0], 3, 1, 1), *((a, b, 2, 2, 0) for a, b in pairwise(widths))]
        self.down = nn.Sequential(
            *(
                nn.Sequential(
                    HeadConv2d(*kernel, bias=False), nn.BatchNorm2d(kernel[1]), nn.LeakyReLU(_SLOPE, inplace=True)
                )
                for kernel in kernels
            )
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                HeadConv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(_SLOPE, inplace=True)
            )
            for a, b in pairwise(widths[::-1])
        )
        self.last = HeadConv2d(widths[0], 3, 3, padding=1)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to codes [B, C, c, c]."""
        return self.down(images)

    def decode(self, code: Tensor, side: int, repair: Repair | None = None, dropped: Tensor | None = None) -> Tensor:
        """Codes to images with a side in px; repaired where entries of the code were dropped, if that is asked for."""
        maps = code
        for number, layer in enumerate(self.up):
            if repair is not None and dropped is not None:
                maps = repair(number, maps, dropped)
            maps = layer(interpolate(maps, size=[side >> (len(self.up) - 1 - number)] * 2))
        return self.last(maps)


def filled_from_neighbours(code: Tensor, dropped: Tensor) -> Tensor:
    """Codes [B, C, c, c] with the mean of its eight neighbours in the place of a dropped entry, bool [B, 1, c, c]."""
    ring = code.new_ones(1, 1, 3, 3)
    ring[..., 1, 1] = 0
    channels = code.shape[1]
    total = torch.nn.functional.conv2d(code, ring.expand(channels, 1, 3, 3), padding=1, groups=channels)
    count = torch.nn.functional.conv2d(code.new_ones(1, 1, *code.shape[-2:]), ring, padding=1)
    return torch.where(dropped, total / count.clamp_min(1), code)
