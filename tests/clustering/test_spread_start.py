"""Where k-means begins: drawn by squared distance, alike on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.clustering.kmeans import kmeans
from largescale.clustering.spread_start import spread_start
from tests.helpers.ranks import run_ranks


def blobs(num: int, width: int = 6) -> Tensor:
    """Points in 20 blobs far apart, of which the first has half of all."""
    generator = torch.Generator().manual_seed(0)
    centres = 50 * torch.randn(20, width, generator=generator)
    numbers = torch.randint(-19, 20, (num,), generator=generator).clamp_min(0)
    return centres[numbers] + torch.randn(num, width, generator=generator)


def test_it_begins_at_points_and_reaches_where_few_are():
    points, better = blobs(3000), []
    for seed in range(4):
        start = spread_start(points, 40, seed)
        assert start.shape == (40, 6) and len(start.unique(dim=0)) == 40
        assert all(bool((points == one).all(1).any()) for one in start)
        ours = kmeans(points, 40, seed=0, start=start, iterations=30).inertia
        better.append(kmeans(points, 40, seed=seed, iterations=30).inertia / ours)
    assert np.mean(better) > 1.2


@torch.no_grad()
def test_a_point_is_drawn_as_the_square_of_its_distance():
    """A point at 0 twice, one at 1, one at 3: with the first at 0, the second is at 3 nine times as often as at 1."""
    points = torch.tensor([[0.0], [0.0], [1.0], [3.0]])
    drawn = [spread_start(points, 2, seed).flatten().tolist() for seed in range(1500)]
    second = [two for one, two in drawn if one == 0]
    assert len(second) == pytest.approx(750, abs=90) and 0 not in second
    assert np.mean(np.array(second) == 3) == pytest.approx(0.9, abs=0.03)


def test_copies_are_drawn_when_nothing_else_is_left():
    start = spread_start(torch.eye(3).repeat(4, 1), 7, 0)
    assert len(start) == 7 and len(start.unique(dim=0)) == 3
    with pytest.raises(ValueError, match="3 points for 4 clusters"):
        spread_start(torch.eye(3), 4, 0)


def of_ranks(bounds: list[int]) -> tuple[Tensor, Tensor]:
    own = dist.get_rank()
    alone = spread_start(blobs(100), 9, 1, alone=True)
    return spread_start(blobs(503)[bounds[own] : bounds[own + 1]], 40, 1), alone


@pytest.mark.distributed
def test_any_number_of_ranks_draws_the_same():
    whole, alone = spread_start(blobs(503), 40, 1), spread_start(blobs(100), 9, 1)
    for found in run_ranks(of_ranks, 3, [0, 201, 201, 503]):
        assert torch.equal(found[0], whole) and torch.equal(found[1], alone)
