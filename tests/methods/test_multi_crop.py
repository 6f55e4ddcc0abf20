from __future__ import annotations

import pytest
import torch

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.multi_crop import by_size, num_large, num_sizes
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT


def crops(method: str, *sizes: int):
    groups = ", ".join(f"{{num: 2, size: {size}}}" for size in sizes)
    return load_config(ROOT / f"tests/methods/mini/{method}.yaml", [f"data.crops=[{groups}]"]).data.crops


@pytest.mark.parametrize("method", ["swav", "mocov2", "mocov3", "nnclr", "byol", "simsiam", "dino"])
def test_the_largest_views_come_first(method):
    """Teachers, keys and assignments are of the first group, so small ones there would be a mistake."""
    assert num_large(crops(method, 24, 24, 16)) == 4
    with pytest.raises(InputError, match=rf"data.crops=.*16, 24 px: expected the largest first with .*{method}"):
        crops(method, 16, 24)


def test_groups_of_one_size_are_taken_together_in_their_order():
    groups = [torch.full((4, 3, size, size), float(number)) for number, size in enumerate((8, 8, 4, 4, 4, 8))]
    found = by_size(groups)
    assert [list(images.shape) for images in found] == [[8, 3, 8, 8], [12, 3, 4, 4], [4, 3, 8, 8]]
    assert [images[::4, 0, 0, 0].tolist() for images in found] == [[0, 1], [2, 3, 4], [5]]
    assert found[2] is groups[5]
    assert num_sizes(crops("swav", 24, 24, 16)) == 2


@pytest.mark.parametrize("method", ["simclr", "deepclusterv2"])
def test_batchnorm_sees_views_of_one_size_together_whatever_their_groups(method):
    torch.manual_seed(0)
    built = build_method(load_config(ROOT / f"tests/methods/mini/{method}.yaml")).double().train()
    large, small = (torch.randn(8, 3, size, size, dtype=torch.float64) for size in (24, 16))
    one, apart = (built.embed(Views.numbered(groups, 4)) for groups in ([large, small], [*large.split(4), small]))
    torch.testing.assert_close(apart["embeddings"], one["embeddings"])
