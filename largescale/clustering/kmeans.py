"""k-means whose points lie on all ranks: Lloyd's algorithm, plain or spherical.

    centroids = the start
    repeat:
        for x in points: cluster of x = nearest centroid
        for c in clusters: centroid of c = mean of its points       # spherical: brought to length 1

The result does not depend on how points lie on ranks as long as their order is the same: sums are exact (see
`fixed_point`), distances are computed in blocks of one shape, and what is drawn follows from the seed.

A cluster that has lost its points takes half of another one's, as in faiss: a donor is drawn with a probability
proportional to its points less one, and both centroids are moved apart by a thousandth. That needs no points, so all
ranks do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize, pad

from largescale.clustering.fixed_point import FixedPoint, sums_by_group
from largescale.processes import from_rank_0, rank, world_size

STARTS = ("random", "kmeans++")

_APART = 1 / 1024
_SIMILARITIES = 2**24
"""Numbers in a block of similarities; 64 MB in float32."""
_SAMPLE = 20
"""Points per cluster among which k-means++ chooses; it goes through them once per cluster."""


@dataclass(frozen=True)
class Clusters:
    """Found by `kmeans`. What is of points is about this rank's; the rest is the same on all ranks.

    Attributes:
        centroids: [K, D], in the points' type.
        assignments: cluster of each point, int64 [n].
        distances: Euclidean, of each point to its centroid, float64 [n].
        sizes: points in each cluster, int64 [K].
        inertia: sum of the squared distances of all points.
        iterations: that it took.
    """

    centroids: Tensor
    assignments: Tensor
    distances: Tensor
    sizes: Tensor
    inertia: float
    iterations: int


@torch.no_grad()
def kmeans(
    points: Tensor,
    count: int,
    *,
    seed: int,
    iterations: int = 20,
    spherical: bool = False,
    start: str | Tensor = "random",
    restarts: int = 1,
    beat: Callable[[str], None] = lambda what: None,
) -> Clusters:
    """Cluster the points of all ranks.

    Args:
        points: of this rank, [n, D] in float32 or float64; spherical: of length 1. Ranks may have different numbers.
        count: clusters, K.
        seed: of the start and of what becomes of empty clusters.
        iterations: at most; fewer if no point changes its cluster.
        spherical: keep centroids at length 1, so that the nearest has the largest cosine.
        start: one of `STARTS` (`kmeans++`: Arthur and Vassilvitskii, 2007, on a sample of the points), or
            centroids [K, D].
        restarts: times to start; the smallest inertia counts.
        beat: told what is being done, so that nobody takes it for a hang.

    Raises:
        ValueError: on all ranks, if there are fewer points than clusters or points are not finite.

    Collectives: every rank must call it; an all-reduce of K (D + 1) + 1 numbers per iteration, and a few.
    """
    exact = FixedPoint(points)
    if exact.total < count:
        raise ValueError(f"{exact.total} points for {count} clusters")
    found = None
    for number in range(restarts):
        first = start if isinstance(start, Tensor) else _start(points, exact, count, start, seed + number)
        one = _lloyd(points, exact, first, seed + number, iterations, spherical, beat)
        if found is None or one.inertia < found.inertia:
            found = one
    assert found is not None
    return found


def _lloyd(
    points: Tensor,
    exact: FixedPoint,
    centroids: Tensor,
    seed: int,
    iterations: int,
    spherical: bool,
    beat: Callable[[str], None],
) -> Clusters:
    assignments = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    for iteration in range(iterations + 1):
        beat(f"k-means of {len(centroids)} clusters, iteration {iteration}")
        nearest = nearest_centroids(points, centroids)
        sums, sizes, moved = _totals(points, exact, nearest, len(centroids), int((nearest != assignments).sum()))
        assignments = nearest
        if moved == 0 or iteration == iterations:
            break
        means = exact.value(sums) / sizes.clamp_min(1)[:, None]
        _refill(means, sizes.cpu().numpy().copy(), np.random.default_rng([seed, iteration]))
        centroids = (normalize(means, dim=1) if spherical else means).to(points.dtype)
    distances = _distances(points, centroids, assignments)
    inertia = float(sums_by_group(distances.square(), torch.zeros_like(assignments), 1))
    return Clusters(centroids, assignments, distances, sizes, inertia, iteration)


def nearest_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each point, int64 [n]; the first of equally near ones. Collectives: none."""
    half_squares = centroids.square().sum(1) / 2
    found = [
        (block @ centroids.T - half_squares).argmax(1)
        # Of one shape, so that a point's similarities do not depend on how many others are with it.
        for block in pad(points, (0, 0, 0, -len(points) % _rows(len(centroids)))).split(_rows(len(centroids)))
    ]
    return torch.cat([torch.empty(0, dtype=torch.int64, device=points.device), *found])[: len(points)]


def _rows(count: int) -> int:
    return max(64, min(4096, _SIMILARITIES // count))


def _totals(
    points: Tensor, exact: FixedPoint, assignments: Tensor, count: int, moved: int
) -> tuple[Tensor, Tensor, int]:
    """Sums and numbers of the points of each cluster, and how many points have moved. Collectives: an all-reduce."""
    width = points.shape[1]
    totals = torch.zeros(count * (width + 1) + 1, dtype=torch.int64, device=points.device)
    sums, sizes = totals[: count * width].view(count, width), totals[count * width : -1]
    for some, theirs in zip(points.split(_rows(count)), assignments.split(_rows(count)), strict=True):
        exact.add(sums, theirs, some)
    sizes.index_add_(0, assignments, torch.ones_like(assignments))
    totals[-1] = moved
    if world_size() > 1:
        dist.all_reduce(totals)
    return sums, sizes, int(totals[-1])


def _refill(means: Tensor, sizes: np.ndarray, generator: np.random.Generator) -> None:
    """Give each empty cluster half of the points of another one, in place."""
    apart = torch.full_like(means[0], 1 + _APART)
    apart[1::2] = 1 - _APART
    for empty in np.flatnonzero(sizes == 0):
        ends = np.maximum(sizes - 1, 0).cumsum()
        donor = int(np.searchsorted(ends, generator.integers(ends[-1]), side="right"))
        means[empty] = means[donor] * apart
        means[donor] *= 2 - apart
        sizes[empty] = sizes[donor] // 2
        sizes[donor] -= sizes[empty]


def _distances(points: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    parts = zip(points.split(4096), assignments.split(4096), strict=True)
    found = [(some.double() - centroids[theirs].double()).square().sum(1).sqrt() for some, theirs in parts]
    return torch.cat([torch.empty(0, dtype=torch.float64, device=points.device), *found])


def _start(points: Tensor, exact: FixedPoint, count: int, how: str, seed: int) -> Tensor:
    """Centroids to start from, which are points, [K, D]. Collectives: those of `_rows_at`, and a broadcast."""
    assert how in STARTS, how
    generator = np.random.default_rng(seed)
    several = 1 if how == "random" else _SAMPLE
    places = generator.choice(exact.total, min(exact.total, count * several), replace=False)
    sample = _rows_at(points, exact, places)
    if how == "random":
        return sample
    # One rank chooses, since a rounding on another might choose otherwise.
    return sample[from_rank_0(_far_apart(sample, count, generator) if rank() == 0 else [])]


def _far_apart(sample: Tensor, count: int, generator: np.random.Generator) -> list[int]:
    """k-means++: a few points are drawn with probabilities proportional to their squared distances to those chosen
    before; the one that leaves the smallest sum of distances is chosen.
    """
    tries = 2 + int(np.log(count))
    chosen = [int(generator.integers(len(sample)))]
    squares = (sample - sample[chosen[-1]]).double().square().sum(1)
    while len(chosen) < count:
        ends = squares.cumsum(0)
        if not float(ends[-1]) > 0:  # the rest are copies of what is chosen
            left = np.setdiff1d(np.arange(len(sample)), chosen)
            return chosen + [int(one) for one in left[: count - len(chosen)]]
        draws = torch.from_numpy(generator.random(tries)).to(ends) * ends[-1]
        places = torch.searchsorted(ends, draws, right=True).clamp_max(len(sample) - 1).tolist()
        left_by = [squares.minimum((sample - sample[place]).double().square().sum(1)) for place in places]
        best = int(torch.stack([one.sum() for one in left_by]).argmin())
        chosen.append(places[best])
        squares = left_by[best]
    return chosen


def _rows_at(points: Tensor, exact: FixedPoint, places: np.ndarray) -> Tensor:
    """Points at these places of all ranks' points, on all ranks. Collectives: one all-reduce of them."""
    first = sum(exact.num_rows[: rank()])
    found = points.new_zeros(len(places), points.shape[1])
    own = np.flatnonzero((places >= first) & (places < first + len(points)))
    found[torch.from_numpy(own).to(points.device)] = points[torch.from_numpy(places[own] - first).to(points.device)]
    if world_size() > 1:
        dist.all_reduce(found)
    return found
