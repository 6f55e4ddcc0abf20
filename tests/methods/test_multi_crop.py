from __future__ import annotations

import pytest

from largescale.config import load_config
from largescale.methods.multi_crop import num_large
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
