"""Where k-means may begin: points that are far from each other, drawn in a few batches.

    centroids = K / 16 points at random
    for a batch of K / 16, K / 8, K / 4, K / 2:
        draw as many points, each with a probability as the square of its distance to the nearest centroid so far

Lloyd's algorithm moves centroids little where there are many, so what starts as dense as the points stays so. k-means++
(Arthur and Vassilvitskii, 2007) draws one point at a time, for which the points are read K times; k-means|| (Bahmani et
al., 2012) draws in rounds, as here. All batches together cost as much as one iteration.

The draw is a race: each point has the time -log(u) / distance^2, with u a hash of its place among all ranks' points,
and the first ones are taken. So it does not depend on how points lie on ranks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.clustering.kmeans import distances_to, nearest_centroids, rows_at
from largescale.data.random import uniform
from largescale.processes import rank, world_size

_BATCHES = (16, 16, 8, 4, 2)
"""Of K: the part that each batch draws; the last one takes what is missing."""
_PURPOSE = 10
"""Of the random numbers."""


@torch.no_grad()
def spread_start(points: Tensor, count: int, seed: int, *, alone: bool = False) -> Tensor:
    """Centroids [K, D] to start k-means with, the same on all ranks.

    Args:
        points: of this rank, [n, D] in float32 or float64, finite.
        count: clusters, K.
        seed: of the draw.
        alone: draw of this rank's points only, whatever other ranks do meanwhile.

    Raises:
        ValueError: on all ranks, if there are fewer points than clusters.

    Collectives: every rank must call it, but for `alone`; per batch one all-gather of objects, of 16 bytes per centroid
        and rank, and an all-reduce of the centroids drawn.
    """
    ranks = 1 if alone else world_size()
    first, total = _place(len(points), ranks)
    if total < count:
        raise ValueError(f"{total} points for {count} clusters")
    places = torch.arange(first, first + len(points), device=points.device)
    squares = torch.ones(len(points), dtype=torch.float64, device=points.device)
    centroids = points.new_empty(0, points.shape[1])
    for number, part in enumerate((*_BATCHES, 1)):
        wanted = min(max(1, count // part), count - len(centroids))
        if wanted == 0:
            break
        some = rows_at(points, first, _first(_times(places, squares, seed, number), places, wanted, ranks), ranks)
        distances = distances_to(points, some, nearest_centroids(points, some, alone=alone)).square()
        squares = distances if number == 0 else torch.minimum(squares, distances)
        centroids = torch.cat([centroids, some])
    return centroids


def _place(own: int, ranks: int) -> tuple[int, int]:
    """Where this rank's points begin among all, and how many there are."""
    numbers: list[int] = [own] * ranks
    if ranks > 1:
        dist.all_gather_object(numbers, own)
    return (sum(numbers[: rank()]) if ranks > 1 else 0), sum(numbers)


def _times(places: Tensor, squares: Tensor, seed: int, batch: int) -> np.ndarray:
    """When each point arrives, float64 [n]; those that are centroids already come after all others."""
    drawn = uniform(seed, _PURPOSE, batch, places.cpu().numpy(), num=1)[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(-np.log1p(-drawn) / squares.cpu().numpy(), nan=np.inf)


def _first(times: np.ndarray, places: Tensor, wanted: int, ranks: int) -> np.ndarray:
    """The places of all ranks' points that arrive first, sorted; ties by place."""
    order = np.argsort(times, kind="stable")[:wanted]
    own = times[order], places.cpu().numpy()[order]
    found = [own] * ranks
    if ranks > 1:
        dist.all_gather_object(found, own)
    all_times, all_places = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return np.sort(all_places[np.lexsort((all_places, all_times))[:wanted]])
