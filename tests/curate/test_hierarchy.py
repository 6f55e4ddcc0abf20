"""Levels flatten a density; any number of ranks finds the same bits.

Covers: largescale/curate/all_rows.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.curate.all_rows import all_rows, own_part
from largescale.curate.hierarchy import Resampling, cluster_level, nearest_members
from tests.helpers.ranks import run_ranks

LINE = Resampling(rounds=10, iterations=50, spherical=False)


def line() -> Tensor:
    """Points on [0, 2], ten times as dense below 1."""
    generator = np.random.default_rng(0)
    return torch.from_numpy(np.concatenate([generator.uniform(0, 1, 10_000), generator.uniform(1, 2, 1_000)]))[:, None]


def share_below(centroids: Tensor) -> float:
    return float((centroids < 1).double().mean())


def test_clusters_of_a_line_end_up_evenly_spread():
    """Centroids of k-means in one dimension are as dense as density^(1/3): 10^(1/3) to 1, or .68 below."""
    shares = []
    for seed in range(3):
        points, found = line(), []
        for count in (1000, 200, 50):
            points = cluster_level(points, count, replace(LINE, rounds=10 if count < 1000 else 0), seed).centroids
            found.append(share_below(points))
        shares.append(found)
    bottom, _, top = np.mean(shares, axis=0)
    assert bottom == pytest.approx(0.68, abs=0.06) and top == pytest.approx(0.5, abs=0.05)
    flat = [share_below(cluster_level(line(), 50, replace(LINE, rounds=0), seed).centroids) for seed in range(3)]
    assert np.mean(flat) > 0.63


def test_resampling_takes_the_nearest_of_each_cluster():
    clusters, distances = torch.tensor([0, 1, 0, 1, 0, 0, 1]), torch.tensor([3.0, 1, 2, 2, 1, 4, 3])
    assert nearest_members(clusters, distances, 2, 2).tolist() == [1, 2, 3, 4]
    assert nearest_members(clusters, distances, 2, 0).tolist() == [1, 4], "half of 3.5"
    assert nearest_members(clusters, distances, 3, 9).tolist() == list(range(7))


def of_ranks(bounds: list[int]) -> dict[str, Any]:
    own = slice(bounds[dist.get_rank()], bounds[dist.get_rank() + 1])
    how = Resampling(rounds=3, iterations=5, spherical=False)
    found = cluster_level(line()[own], 60, how, seed=3)
    alone = cluster_level(line()[:500], 9, how, seed=4, alone=True) if dist.get_rank() == 0 else None
    numbers = torch.arange(own.start, own.stop)
    places = torch.tensor([0, 17, 400, 10_999])
    return {
        **vars(found),
        "alone": None if alone is None else alone.centroids,
        "all": all_rows(numbers),
        "own": numbers[own_part(places, len(numbers))],
    }


@pytest.mark.distributed
def test_any_number_of_ranks_finds_the_same_bits():
    [whole] = run_ranks(of_ranks, 1, [0, 11_000])
    found = run_ranks(of_ranks, 3, [0, 17, 17, 11_000])
    for one in found:
        assert torch.equal(one["centroids"], whole["centroids"])
        assert one["all"].tolist() == list(range(11_000))
    for key in ("assignments", "distances"):
        assert torch.equal(torch.cat([one[key] for one in found]), whole[key])
    assert torch.equal(found[0]["alone"], whole["alone"])
    assert torch.cat([one["own"] for one in found]).tolist() == [0, 17, 400, 10_999]
