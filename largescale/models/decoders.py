"""Heads that turn a backbone's maps into images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import interpolate

from largescale.models.heads import HeadConv2d


class DenseDecoder(nn.Module):
    """Layers that each enlarge maps by the same factor and convolve them: [B, C, h, w] to [B, K, S, S].

    Enlarged maps repeat their values: unlike transposed convolutions that leaves no checkerboard, and unlike bilinear
    ones it has one gradient on every device.

    Args:
        num_features: C.
        widths: of the layers; five make 224 pixels of 7.
        channels: K.
    """

    def __init__(self, num_features: int, widths: Sequence[int], channels: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                HeadConv2d(width, next_width, 3, padding=1, bias=False),
                nn.BatchNorm2d(next_width),
                nn.ReLU(inplace=True),
            )
            for width, next_width in pairwise([num_features, *widths])
        )
        self.last = HeadConv2d(widths[-1], channels, 3, padding=1)

    def forward(self, maps: Tensor, side: int) -> Tensor:
        """Images with a side of so many pixels."""
        small, count = maps.shape[-1], len(self.layers)
        for number, layer in enumerate(self.layers, 1):
            maps = layer(interpolate(maps, size=[round(small * (side / small) ** (number / count))] * 2))
        return self.last(maps)
