from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv2d

from largescale.models.channelwise import ChannelwiseLinear


@pytest.mark.parametrize("channels, side", [(5, 3), (2, 1), (256, 6)])
def test_each_cell_is_a_sum_of_all_cells_of_its_channel(channels, side):
    layer, maps = ChannelwiseLinear(channels, side).double(), torch.randn(4, channels, side, side, dtype=torch.float64)
    assert sum(p.numel() for p in layer.parameters()) == channels * side**4
    made = layer(maps.contiguous(memory_format=torch.channels_last))
    assert made.shape == maps.shape
    weight = layer.weight.view(channels, side * side, side, side)
    for c in range(min(3, channels)):
        cells = [(weight[c, k] * maps[1, c]).sum() for k in range(side * side)]
        torch.testing.assert_close(made[1, c].flatten(), torch.stack(cells))
    as_convolution = conv2d(maps, layer.weight, groups=channels).view_as(maps)
    torch.testing.assert_close(made, as_convolution)
