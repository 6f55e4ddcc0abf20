"""A layer that joins the cells of a map, one channel by itself (arXiv 1604.07379, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from largescale.models.heads import HeadConv2d


class ChannelwiseLinear(HeadConv2d):
    """Of every channel, each cell of the new map from all cells of the old one: [B, C, h, h] to [B, C, h, h].

    So h^4 weights per channel, where a linear layer of all channels would have C times as many. Channels do not mix.
    They are the weights of a convolution in C groups whose kernel is the map.

    Args:
        channels: C.
        side: h.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__(channels, channels * side * side, side, groups=channels, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps of the same shape, each cell a weighted sum."""
        channels, cells = maps.shape[1], maps.shape[2] * maps.shape[3]
        weight = self.weight.view(channels, cells, cells)
        rows = torch.bmm(maps.flatten(2).transpose(0, 1), weight.transpose(1, 2))  # [C, B, cells]
        return rows.transpose(0, 1).reshape(maps.shape)
