"""k-means whose points lie on all ranks: Lloyd's algorithm, from several starts.

    centroids = points at random
    repeat:
        for x in points: cluster of x = nearest centroid
        for c in clusters: centroid of c = mean of its points

The result does not depend on how points lie on ranks as long as their order is the same: sums are exact (see
`fixed_point`), distances are computed in blocks of one shape, and what is drawn follows from the seed.

A cluster that has lost its points takes half of another one's, as in faiss: a donor is drawn with a probability
proportional to its points less one, and both centroids are moved apart by a thousandth. That needs no points, so all
ranks do the same.

Spherical k-means is the same with centroids of length 1: the nearest to a point of length 1 has the largest cosine.

Memory: points are never copied. See `working_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, pad

from largescale.clustering.fixed_point import FixedPoint, sums_by_group
from largescale.processes import rank

_APART = 1 / 1024
_BLOCK, _ON_CPU = (4096, 4096), (256, 1024)
"""Points and centroids whose similarities are computed together: 64 MB in float32. On a CPU 1 MB, for its caches; of
2 MB and more the C library returns the memory after every block, and the system clears it again."""
_DEPTH = 1024
"""Numbers of a point that oneDNN sums at a time: of more, its kernels may split a sum over threads, and round it
differently for other numbers of them."""
_GROUP = 64
"""Similarities of which the largest is found without its place, which is faster; divides the above."""
_OF_A_POINT = 72
"""Bytes: assignments and distances of two starts, and what adds up distances."""
_OF_A_MEAN = 32
"""Bytes of a number of a centroid: its sum in fixed point, and three in float64 on the way to the mean."""


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
    restarts: int = 1,
    spherical: bool = False,
    alone: bool = False,
    start: Tensor | None = None,
    beat: Callable[[str], None] = lambda what: None,
) -> Clusters:
    """Cluster the points of all ranks.

    Args:
        points: of this rank, [n, D] in float32 or float64. Ranks may have different numbers.
        count: clusters, K.
        seed: of the start and of what becomes of empty clusters.
        iterations: at most; fewer if no point changes its cluster.
        restarts: times to start; the smallest inertia counts, which is the same number on all ranks.
        spherical: whether centroids are normalised to length 1; points must be.
        alone: cluster this rank's points only, whatever other ranks do meanwhile.
        start: centroids [K, D] to begin with instead of points at random, the same on all ranks; with no iterations,
            points are only assigned to them, and there may be fewer of these than clusters.
        beat: told what is being done; all ranks call it equally often, so it may exchange, and end this by raising.

    Raises:
        ValueError: on all ranks, if there are fewer points than clusters or points are not finite.

    Collectives: every rank must call it, but for `alone`; an all-reduce of K (D + 1) + 1 numbers per iteration, and a
        few; those of `beat`.
    """
    exact = FixedPoint(points, alone=alone)
    if start is not None:
        return _lloyd(points, exact, start, seed, iterations, spherical, beat)
    if exact.total < count:
        raise ValueError(f"{exact.total} points for {count} clusters")
    found, first = None, sum(exact.num_rows[: rank()]) if exact.ranks > 1 else 0
    for number in range(restarts):
        places = np.random.default_rng(seed + number).choice(exact.total, count, replace=False)
        start = rows_at(points, first, places, exact.ranks)
        one = _lloyd(points, exact, start, seed + number, iterations, spherical, beat)
        if found is None or one.inertia < found.inertia:
            found = one
    assert found is not None
    return found


def working_bytes(num_points: int, count: int, width: int, itemsize: int) -> int:
    """Most bytes that `kmeans` holds at a time beside this rank's points.

    Args:
        num_points: of this rank.
        count: clusters.
        width: of a point.
        itemsize: bytes of a number of a point.
    """
    rows, columns = _BLOCK
    block = rows * min(columns, count + _GROUP) * itemsize
    return num_points * _OF_A_POINT + count * width * (_OF_A_MEAN + 4 * itemsize) + block


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
        nearest = nearest_centroids(points, centroids, alone=exact.alone)
        sums, sizes, moved = _totals(points, exact, nearest, len(centroids), int((nearest != assignments).sum()))
        assignments = nearest
        if moved == 0 or iteration == iterations:
            break
        means = exact.value(sums) / sizes.clamp_min(1)[:, None]
        _refill(means, sizes.cpu().numpy().copy(), np.random.default_rng([seed, iteration]))
        if spherical:
            means /= means.norm(dim=1, keepdim=True).clamp_min(torch.finfo(points.dtype).tiny)
        centroids = means.to(points.dtype)
    distances = distances_to(points, centroids, assignments)
    inertia = float(sums_by_group(distances.square(), torch.zeros_like(assignments), 1, alone=exact.alone))
    return Clusters(centroids, assignments, distances, sizes, inertia, iteration)


@torch.no_grad()
def nearest_centroids(points: Tensor, centroids: Tensor, *, alone: bool = False) -> Tensor:
    """The nearest centroid of each point, int64 [n]; the first of equally near ones. In the precision of the points
    under any autocast. Collectives: none.

    Args:
        points: [n, D].
        centroids: [K, D].
        alone: whether these points are always together: what is found of one may then depend on how many there are.
    """
    with torch.autocast(points.device.type, enabled=False):
        return _nearest(points, centroids, alone)


def _nearest(points: Tensor, centroids: Tensor, alone: bool) -> Tensor:
    rows, columns = _block(points.device)
    parts = [_in_groups(part) for part in centroids.split(columns)]
    nearest = torch.empty(len(points), dtype=torch.int64, device=points.device)
    for block, found in zip(points.split(rows), nearest.split(rows), strict=True):
        # Of one shape, so that a point's similarities do not depend on how many others are with it.
        whole = block if alone or len(block) == rows else pad(block, (0, 0, 0, rows - len(block)))
        best, place = _largest(_affine(whole, *parts[0]))
        for number, part in enumerate(parts[1:], 1):
            larger, where = _largest(_affine(whole, *part))
            better = larger > best
            best, place = torch.where(better, larger, best), torch.where(better, where + number * columns, place)
        found.copy_(place[: len(block)])
    return nearest


def _block(device: torch.device) -> tuple[int, int]:
    return _ON_CPU if device.type == "cpu" else _BLOCK


def _in_groups(centroids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Weights, in pieces by width, and biases of similarities, with centroids that are nearest to nothing up to a
    multiple of a group.
    """
    missing = -len(centroids) % _GROUP
    weights = [pad(piece, (0, 0, 0, missing)) for piece in centroids.split(_depth(centroids), dim=1)]
    return weights, pad(centroids.square().sum(1) / -2, (0, missing), value=-torch.inf)


def _depth(tensor: Tensor) -> int:
    return _DEPTH if _is_for_onednn(tensor) else max(1, tensor.shape[1])


def _is_for_onednn(tensor: Tensor) -> bool:
    """On AMD's processors oneDNN takes half the time of MKL, which plain tensors are multiplied by."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _affine(rows: Tensor, weights: list[Tensor], biases: Tensor) -> Tensor:
    """Similarities [n, k], larger for smaller distances."""
    if not _is_for_onednn(rows):
        [whole] = weights
        return torch.addmm(biases, rows, whole.T)
    first, *others = zip(rows.split(_DEPTH, dim=1), weights, strict=True)
    found = linear(first[0].to_mkldnn(), first[1], biases).to_dense()
    for piece, own in others:  # one after another: in this order whatever the threads
        found += linear(piece.to_mkldnn(), own).to_dense()
    return found


def _largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row, and the first place where it is: the best group, and the best in it."""
    groups = values.view(len(values), -1, _GROUP)
    best, group = groups.amax(2).max(1)
    inside = groups[torch.arange(len(groups), device=groups.device), group].max(1).indices
    return best, group * _GROUP + inside


def _totals(
    points: Tensor, exact: FixedPoint, assignments: Tensor, count: int, moved: int
) -> tuple[Tensor, Tensor, int]:
    """Sums and numbers of the points of each cluster, and how many points have moved. Collectives: an all-reduce."""
    width = points.shape[1]
    totals = torch.zeros(count * (width + 1) + 1, dtype=torch.int64, device=points.device)
    sums, sizes = totals[: count * width].view(count, width), totals[count * width : -1]
    rows, _ = _block(points.device)
    for some, theirs in zip(points.split(rows), assignments.split(rows), strict=True):
        exact.add(sums, theirs, some)
    sizes.index_add_(0, assignments, torch.ones_like(assignments))
    totals[-1] = moved
    if exact.ranks > 1:
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


def distances_to(points: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    """Euclidean distance of each point to the centroid that it is assigned to, float64 [n]. Collectives: none."""
    distances = torch.empty(len(points), dtype=torch.float64, device=points.device)
    rows, _ = _block(points.device)
    for some, theirs, found in zip(*(whole.split(rows) for whole in (points, assignments, distances)), strict=True):
        found.copy_((some.double() - centroids[theirs].double()).square().sum(1).sqrt())
    return distances


def rows_at(points: Tensor, first: int, places: np.ndarray, ranks: int) -> Tensor:
    """Points at these places of all ranks' points, on all ranks. Collectives: one all-reduce of them.

    Args:
        points: of this rank, which are those from place `first` on.
        first: place of this rank's first point.
        places: int64.
        ranks: that share the points; a single one exchanges nothing.
    """
    found = points.new_zeros(len(places), points.shape[1])
    own = np.flatnonzero((places >= first) & (places < first + len(points)))
    found[torch.from_numpy(own).to(points.device)] = points[torch.from_numpy(places[own] - first).to(points.device)]
    if ranks > 1:
        dist.all_reduce(found)
    return found
