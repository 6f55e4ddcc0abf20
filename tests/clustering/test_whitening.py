from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn.functional import normalize

from largescale.clustering.whitening import whitened
from tests.helpers.ranks import run_ranks

COUNT, WIDTH = 120, 7


def features() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    points = torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64)
    return (
        points * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1, 0.01]) @ torch.randn(WIDTH, WIDTH, generator=generator).double()
        + 3
    )


@pytest.mark.parametrize("count", [3, WIDTH, 99])
def test_components_are_those_of_scikit_learn_but_for_their_signs(count):
    found = whitened(features(), count)
    theirs = normalize(torch.from_numpy(PCA(min(count, WIDTH), whiten=True).fit_transform(features().numpy())), dim=1)
    torch.testing.assert_close(found @ found.T, theirs @ theirs.T, rtol=0, atol=1e-9)
    assert found.shape == theirs.shape


def test_directions_without_variance_are_left_out():
    points = torch.cat([features()[:, :3], torch.ones(COUNT, 2, dtype=torch.float64)], dim=1)
    found = whitened(points, 5)
    torch.testing.assert_close(found @ found.T, whitened(points[:, :3], 3) @ whitened(points[:, :3], 3).T)
    assert whitened(torch.ones(9, 4), 4).tolist() == [[0.0] * 4] * 9
    with pytest.raises(ValueError, match="not finite"):
        whitened(torch.full((3, 2), torch.nan), 2)


def own_part() -> Tensor:
    """Of three ranks the last has no points."""
    bounds = [0, 50, COUNT, COUNT]
    return whitened(features()[bounds[dist.get_rank()] : bounds[dist.get_rank() + 1]], 4)


@pytest.mark.distributed
def test_ranks_find_what_one_finds():
    alone, together = whitened(features(), 4), torch.cat(run_ranks(own_part, 3))
    torch.testing.assert_close(together @ together.T, alone @ alone.T, rtol=0, atol=1e-12)
