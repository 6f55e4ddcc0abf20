"""The last pool of a backbone: means of the cells of a grid laid over its maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d


class GridMean(nn.Module):
    """Maps [B, C, h, w] to means [B, C, side, side], of cells as `nn.AdaptiveAvgPool2d` lays them.

    That one's gradient is not deterministic on CUDA; where that is asked for (`train.deterministic`), means of slices
    stand in, whose gradients are.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, maps: Tensor) -> Tensor:
        """Cells are rectangles, so the mean over rows, then over columns, is that of a cell."""
        if not torch.are_deterministic_algorithms_enabled():
            return adaptive_avg_pool2d(maps, self.side)
        for axis in (2, 3):
            size = maps.shape[axis]
            cells = [(size * n // self.side, -(-size * (n + 1) // self.side)) for n in range(self.side)]
            means = [maps.narrow(axis, start, end - start).mean(axis) for start, end in cells]
            maps = torch.stack(means, axis)
        return maps
