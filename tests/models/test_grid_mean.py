from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from largescale.config import load_config
from largescale.data.length import Length
from largescale.methods import require_fit
from largescale.models.grid_mean import GridMean
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT


@pytest.mark.parametrize("shape", [(4, 4), (7, 5), (3, 8), (1, 1), (2, 3)])
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_cells_and_gradients_are_those_of_torch(shape, side):
    maps = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    pool, theirs = GridMean(side), adaptive_avg_pool2d(maps, side)
    assert torch.equal(pool(maps), theirs)
    torch.use_deterministic_algorithms(True)
    try:
        own = pool(maps)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(own, theirs)
    weights = torch.randn_like(own)
    [mine] = torch.autograd.grad((own * weights).sum(), maps)
    [expected] = torch.autograd.grad((theirs * weights).sum(), maps)
    torch.testing.assert_close(mine, expected)


def test_a_grid_finer_than_the_maps_is_refused_before_anything_is_read():
    config = load_config(ROOT / "configs/demo.yaml", ["model.pool=5"])
    with pytest.raises(
        InputError, match=r"model\.pool=5: evaluate\.size=28 makes maps of 4 x 4 places, fewer than cells"
    ):
        require_fit(config, Length.nominal(config))
    config.model.pool = 4
    require_fit(config, Length.nominal(config))


def test_a_grid_finer_than_the_maps_of_tiles_is_refused_by_their_key():
    load_config(ROOT / "configs/small/jigsaw.yaml", ["model.pool=1"])
    with pytest.raises(InputError, match=r"model\.pool=4: method\.tile=\d+ makes maps of \d x \d places"):
        load_config(ROOT / "configs/small/jigsaw.yaml", ["model.pool=4"])
