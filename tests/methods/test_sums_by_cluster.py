"""Sums that follow what moves, against sums of all rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.methods.phase import own_ids
from largescale.methods.sums_by_cluster import SumsByCluster
from tests.helpers.ranks import run_ranks

NUM, WIDTH, COUNT = 50, 4, 5


def rows_and_clusters(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(NUM, WIDTH, generator=generator), dim=1), torch.randint(
        -1, COUNT, (NUM,), generator=generator
    )


def moved(steps: int = 20) -> dict[str, Tensor]:
    """All rows are replaced again and again, by steps of all ranks and by moves of each rank's own."""
    sums, centroids = SumsByCluster(WIDTH), torch.full((COUNT, WIDTH), 7.0)
    sums.make_room(COUNT)
    own = own_ids(NUM)
    mine = slice(own.start, own.stop)
    rows, former = rows_and_clusters(0)
    sums.move_over_ranks(rows[mine], torch.full_like(former[mine], -1), former[mine])
    for step in range(1, steps):
        new, clusters = rows_and_clusters(step)
        sums.subtract(rows, former)
        sums.add(new, clusters)
        rows, former = new, clusters
        sums.move_over_ranks(rows[mine], former[mine], former.roll(1)[mine])
        former = former.roll(1)
    sums.means_into(centroids)
    return {"totals": sums.totals, "centroids": centroids, "rows": rows, "clusters": former}


@pytest.mark.distributed
def test_sums_are_those_of_the_rows_that_are_there_on_any_number_of_ranks():
    [alone], others = run_ranks(moved, 1, timeout_s=600), run_ranks(moved, 3, timeout_s=600)
    for other in others:
        assert torch.equal(other["totals"], alone["totals"])
    rows, clusters = alone["rows"].double(), alone["clusters"]
    for place in range(COUNT):
        own = rows[clusters == place]
        assert int(alone["totals"][place, -1]) == len(own)
        torch.testing.assert_close(
            alone["totals"][place, :-1].double() * 2.0**-32, own.sum(0), rtol=0, atol=NUM * 2.0**-33
        )
        torch.testing.assert_close(alone["centroids"][place], normalize(own.sum(0), dim=0).float())


@pytest.mark.usefixtures("group_of_one")
def test_an_empty_cluster_keeps_its_centroid():
    sums, centroids = SumsByCluster(2), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    sums.make_room(2)
    sums.add(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, -1]))
    sums.means_into(centroids)
    assert centroids.tolist() == [[3.0, 4.0], [0.0, 1.0]]
    sums.subtract(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    assert not sums.totals.any()
