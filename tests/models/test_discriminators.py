from __future__ import annotations

import pytest
import torch

from largescale.models.discriminators import ConvDiscriminator


@pytest.mark.parametrize(
    "side, widths, left", [(64, [4, 4, 4, 4], 4), (28, [4, 6, 8], 3), (2, [4], 1), (113, [2] * 5, 3)]
)
def test_images_of_any_size_get_a_score_each(side, widths, left):
    network = ConvDiscriminator(side, widths).eval().double()  # five layers of two channels leave little of a pixel
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    assert network(images).shape == (3,) and network.layers(images).shape[-1] == left
    # Each score is of one image, and of all of its parts that a layer sees.
    changed = images.clone()
    changed[1, :, -1 - side % 2, 0] += 10
    assert (network(images) != network(changed)).tolist() == [False, True, False]
