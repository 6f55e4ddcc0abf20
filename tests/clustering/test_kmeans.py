"""k-means against scikit-learn, a loop in numpy, and itself on other numbers of ranks.

Covers: largescale/clustering/fixed_point.py
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import linear, normalize

from largescale.clustering import kmeans as kmeans_module
from largescale.clustering.fixed_point import FixedPoint, mean_of_rows, sums_by_group
from largescale.clustering.kmeans import Clusters, kmeans, nearest_centroids
from tests.helpers.ranks import Counted, run_ranks

BLOBS, WIDTH, COUNT = 7, 5, 503


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A group of one, as in a run of a process."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@cache
def blobs(dtype: torch.dtype = torch.float64, apart: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(BLOBS, WIDTH, generator=generator) * apart
    numbers = torch.randint(BLOBS, (COUNT,), generator=generator)
    return (centres[numbers] + torch.randn(COUNT, WIDTH, generator=generator)).to(dtype)


def naive(points: Tensor, centroids: Tensor, iterations: int, spherical: bool = False) -> np.ndarray:
    """Lloyd in numpy: a point at a time."""
    found, means = np.zeros(len(points), int), centroids.numpy().copy()
    for _ in range(iterations):
        for number, x in enumerate(points.numpy()):
            found[number] = np.argmin([((x - c) ** 2).sum() for c in means])
        for c in range(len(means)):
            means[c] = points.numpy()[found == c].mean(0)
            if spherical:
                means[c] /= np.linalg.norm(means[c])
    return means


@pytest.mark.parametrize("unit", [False, True])
def test_steps_are_those_of_a_loop_from_the_same_start(unit):
    points = normalize(blobs(), dim=1) if unit else blobs()
    start = kmeans(points, 4, seed=0, iterations=0).centroids
    assert all(bool((points == one).all(1).any()) for one in start), "points"
    for iterations in (1, 3):
        means = naive(points, start, iterations)
        found = kmeans(points, 4, seed=0, iterations=iterations)
        np.testing.assert_allclose(found.centroids.numpy(), means, rtol=0, atol=1e-12)
        assert torch.equal(found.assignments, nearest_centroids(points, found.centroids))
        distances = (points - found.centroids[found.assignments]).norm(dim=1)
        torch.testing.assert_close(found.distances, distances)
        assert found.inertia == pytest.approx(float(distances.square().sum()), rel=1e-12)
        assert torch.equal(found.sizes, found.assignments.bincount(minlength=4))


def test_a_start_may_be_given():
    whole, first = kmeans(blobs(), 6, seed=0, iterations=5), kmeans(blobs(), 6, seed=0, iterations=2)
    again = kmeans(blobs(), 6, seed=1, iterations=3, start=first.centroids)
    assert torch.equal(again.centroids, whole.centroids) and again.inertia == whole.inertia
    few = kmeans(blobs()[:3], 6, seed=0, iterations=0, start=first.centroids)
    assert torch.equal(few.assignments, nearest_centroids(blobs()[:3], first.centroids))


def test_spherical_steps_are_those_of_a_loop_from_the_same_start():
    points = normalize(blobs(), dim=1)
    start = kmeans(points, 4, seed=0, iterations=0, spherical=True).centroids
    for iterations in (1, 3):
        found = kmeans(points, 4, seed=0, iterations=iterations, spherical=True)
        means = naive(points, start, iterations, spherical=True)
        np.testing.assert_allclose(found.centroids.numpy(), means, rtol=0, atol=1e-12)
        assert torch.equal(found.assignments, (points @ found.centroids.T).argmax(1))
        cosines = (points * found.centroids[found.assignments]).sum(1)
        assert found.inertia == pytest.approx(float((2 - 2 * cosines).sum()), rel=1e-9)


def test_inertia_is_not_above_that_of_scikit_learn():
    points = blobs(apart=1.0)  # they overlap, so there are many ways to end
    theirs = KMeans(BLOBS, n_init=10, random_state=0, max_iter=300, tol=0).fit(points.numpy()).inertia_
    ours = kmeans(points, BLOBS, seed=0, iterations=300, restarts=10)
    assert ours.inertia <= theirs * (1 + 1e-3)
    apart = kmeans(blobs(apart=20.0), BLOBS, seed=0, restarts=10)
    known = KMeans(BLOBS, n_init=10, random_state=0).fit(blobs(apart=20.0).numpy())
    assert apart.inertia == pytest.approx(known.inertia_, rel=1e-9)


def test_a_cluster_that_is_left_empty_takes_half_of_another():
    """Half of the points are copies of one, so that several clusters start there and the first of them takes all."""
    points = torch.cat([blobs(), blobs()[:1].expand(COUNT, -1)])
    start = kmeans(points, 12, seed=0, iterations=0)
    empty = int((start.sizes == 0).sum())
    assert empty >= 3
    found = kmeans(points, 12, seed=0, iterations=100)
    assert int((found.sizes == 0).sum()) < empty and int(found.sizes.sum()) == 2 * COUNT
    assert found.inertia < kmeans(points, 12 - empty, seed=0, iterations=100).inertia


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 63, 64, 2500])
def test_the_first_of_the_nearest_is_found_among_many_centroids_wherever_a_point_lies(dtype, count):
    generator = torch.Generator().manual_seed(count)
    points = torch.randint(-3, 4, (1100, 4), generator=generator).to(dtype)  # whole numbers: many are equally near
    centroids = torch.randint(-3, 4, (count, 4), generator=generator).to(dtype)
    found = nearest_centroids(points, centroids)
    distances = (points[:, None] - centroids).square().sum(2)
    assert found.tolist() == [row.index(min(row)) for row in distances.tolist()]
    for first in (1, 300, 1001):
        assert torch.equal(nearest_centroids(points[first:], centroids), found[first:])


@pytest.mark.parametrize("width", [1024, 2048, 2500])
def test_similarities_of_wide_points_do_not_depend_on_threads(width):
    generator = torch.Generator().manual_seed(width)
    points, centroids = (torch.randn(count, width, generator=generator) for count in (256, 64))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(kmeans_module._affine(points, *kmeans_module._in_groups(centroids)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    exact = points.double() @ centroids.double().T - centroids.double().square().sum(1) / 2
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-2)


def test_points_are_compared_in_their_own_precision_under_autocast():
    """Of bf16, close points would all be as near to the first centroid."""
    generator = torch.Generator().manual_seed(0)
    points = normalize(1 + 0.05 * torch.randn(200, 16, generator=generator), dim=1)
    centroids = points[:50]
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_centroids(points, centroids)
    assert torch.equal(found, nearest_centroids(points, centroids)) and len(found.unique()) > 40


def test_sums_over_a_wide_point_are_in_pieces_that_no_kernel_splits(monkeypatch):
    widths = []

    def noted(rows: Tensor, weights: Tensor, biases: Tensor | None = None) -> Tensor:
        widths.append(weights.shape[1])
        return linear(rows, weights, biases)

    monkeypatch.setattr(kmeans_module, "linear", noted)
    for width in (5, 1024, 2500):
        nearest_centroids(torch.ones(3, width), torch.ones(2, width))
    if torch.backends.mkldnn.is_available():
        assert widths == [5, 1024, 1024, 1024, 452]


def test_it_stops_where_nothing_moves():
    found = kmeans(blobs(apart=20.0), BLOBS, seed=0, iterations=100)
    assert 1 <= found.iterations < 20


def test_copies_of_few_points_leave_clusters_empty_and_nothing_else():
    copies = torch.eye(3, dtype=torch.float64).repeat(20, 1)
    found = kmeans(copies, 5, seed=0, restarts=3)
    assert found.centroids.isfinite().all() and int(found.sizes.sum()) == 60
    assert kmeans(copies, 3, seed=0, restarts=9).inertia == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    "points, words",
    [
        (torch.zeros(3, 2), "3 points for 4 clusters"),
        (torch.full((9, 2), torch.nan), "not finite"),
        (torch.eye(9).index_fill(0, torch.tensor(4), torch.nan), "not finite"),
        (torch.eye(9).index_fill(0, torch.tensor(4), -torch.inf), "not finite"),
    ],
)
def test_what_cannot_be_clustered_is_refused(points, words):
    with pytest.raises(ValueError, match=words):
        kmeans(points, 4, seed=0)


def test_sums_are_the_same_bits_in_any_order():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator).exp() * 1e6
    groups = torch.randint(3, (1000,), generator=generator)
    order = torch.randperm(1000, generator=generator)
    found = sums_by_group(values, groups, 3)
    assert torch.equal(found, sums_by_group(values[order], groups[order], 3))
    expected = torch.stack([values[groups == group].double().sum() for group in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert FixedPoint(torch.zeros(0, 2)).total == 0 and sums_by_group(torch.zeros(4), groups[:4], 3).tolist() == [0] * 3


def test_a_mean_is_that_of_all_rows():
    torch.testing.assert_close(mean_of_rows(blobs()), blobs().mean(0), rtol=1e-12, atol=1e-12)
    assert mean_of_rows(torch.zeros(0, 2)).tolist() == [0, 0]


def cluster_own(cases: list[tuple[torch.dtype, int, bool]]) -> list[dict[str, Any]]:
    """Each rank has another number of points; the last of several has none."""
    size, own_rank = dist.get_world_size(), dist.get_rank()
    bounds = [0] + [COUNT * (place + 1) // (size + 1) for place in range(size - 2)] + [COUNT] * min(2, size)
    results = []
    for dtype, restarts, spherical in cases:
        points = normalize(blobs(dtype), dim=1) if spherical else blobs(dtype)
        own = points[bounds[own_rank] : bounds[own_rank + 1]]
        with Counted() as counted:
            found: Clusters = kmeans(own, 40, seed=5, iterations=4, restarts=restarts, spherical=spherical)
        results.append({**vars(found), "calls": counted.calls, "mean": mean_of_rows(own)})
    return results


@pytest.mark.distributed
def test_any_number_of_ranks_finds_the_same_bits():
    cases = [(torch.float64, 1, False), (torch.float32, 1, False), (torch.float32, 3, False), (torch.float32, 1, True)]
    [alone] = run_ranks(cluster_own, 1, cases, timeout_s=600)
    assert all(not one["calls"] for one in alone)
    for ranks in (2, 3, 4):
        found = run_ranks(cluster_own, ranks, cases, timeout_s=600)
        for case, expected in enumerate(alone):
            ours = [one[case] for one in found]
            for one in ours:
                for key in ("centroids", "sizes", "mean"):
                    assert torch.equal(one[key], expected[key]), (ranks, case, key)
                assert (one["inertia"], one["iterations"]) == (expected["inertia"], expected["iterations"])
            for key in ("assignments", "distances"):
                assert torch.equal(torch.cat([one[key] for one in ours]), expected[key]), (ranks, case, key)
            large = [size for name, size in ours[0]["calls"] if name == "all_reduce" and size == 40 * (WIDTH + 1) + 1]
            restarts = cases[case][1]
            assert expected["iterations"] == 4 and len(large) == 5 * restarts
            assert len(ours[0]["calls"]) <= len(large) + 1 + 4 * restarts


def cluster_alone() -> dict[str, Any]:
    with Counted() as counted:
        found = kmeans(blobs()[: COUNT - 100 * dist.get_rank()], 9, seed=1 + dist.get_rank(), alone=True)
    return {"centroids": found.centroids, "inertia": found.inertia, "calls": counted.calls}


@pytest.mark.distributed
def test_a_rank_alone_clusters_its_own_points_without_the_others():
    for own_rank, found in enumerate(run_ranks(cluster_alone, 3)):
        expected = kmeans(blobs()[: COUNT - 100 * own_rank], 9, seed=1 + own_rank)
        assert torch.equal(found["centroids"], expected.centroids) and found["inertia"] == expected.inertia
        assert not found["calls"]
