from __future__ import annotations

import pytest
import torch

from largescale.models.decoders import DenseDecoder


@pytest.mark.parametrize("small, side, layers", [(7, 224, 5), (2, 28, 4), (13, 227, 2), (1, 5, 1), (4, 4, 2)])
def test_maps_become_images_of_any_size(small, side, layers):
    decoder = DenseDecoder(6, [5] * layers)
    assert decoder(torch.randn(2, 6, small, small), side).shape == (2, 3, side, side)


def test_sides_grow_by_the_same_factor():
    decoder, seen = DenseDecoder(4, [4] * 5), []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    decoder(torch.randn(1, 4, 7, 7), 224)
    assert seen == [14, 28, 56, 112, 224]


def test_each_place_of_the_maps_makes_its_part_of_the_image():
    torch.manual_seed(0)  # not weights with which a ReLU leaves a place at 0
    decoder = DenseDecoder(4, [4, 4]).eval()
    maps = torch.randn(1, 4, 4, 4)
    changed = maps.clone()
    changed[..., 0, 0] += 1
    differs = (decoder(maps, 64) - decoder(changed, 64)).abs().sum((0, 1)) > 0
    assert differs[:16, :16].all() and not differs[32:].any() and not differs[:, 32:].any()
