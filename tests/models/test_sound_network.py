from __future__ import annotations

import pytest
import torch

from largescale.models.sound_network import SoundNetwork, least_side


def test_a_second_ends_in_the_maps_of_the_paper():
    with torch.device("meta"):
        network = SoundNetwork(48_000, [64, 128, 256, 512])
        shapes = []
        x = torch.empty(2, 1, 257, 200)
        for stage in network.stages:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 129, 100), (128, 64, 50), (256, 32, 25), (512, 16, 12)]
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [conv.in_channels for conv in convolutions] == [1, 64, 64, 128, 128, 256, 256, 512]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_the_largest_values_of_maps(dtype):
    network = SoundNetwork(2000, [4, 6]).to(dtype).eval()
    sounds = torch.randint(-3000, 3000, (3, 200), dtype=torch.int16)
    features = network(sounds)
    assert features.shape == (3, network.num_features) == (3, 6) and features.dtype == dtype
    assert torch.equal(features, network.maps(sounds).flatten(2).amax(2))


def test_the_smallest_spectrogram_that_stages_can_see():
    """Each stage but the first halves what the first one, of stride 2, has left."""
    for stages in (1, 2, 3, 4):
        network, side = SoundNetwork(1000, [2] * stages).stages.eval(), least_side(stages)
        assert network(torch.zeros(1, 1, side, side)).shape[2:] == (1, 1)
        if side > 1:
            with pytest.raises(RuntimeError, match="too small"):
                network(torch.zeros(1, 1, side - 1, side - 1))
