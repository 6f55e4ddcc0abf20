"""One level of hierarchical k-means, with resampling.

    clusters = k-means of all points
    repeat, for some rounds:
        those = the r points nearest to every centroid
        centroids = k-means of those; each point joins the nearest centroid

k-means puts more centroids where points are dense, as density^(D / (D + 2)); clustering the centroids again, and within
a level the few points nearest to each, spreads them more evenly at every step. "Automatic Data Curation for
Self-Supervised Learning" (Vo et al., 2024), section 3.2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from largescale.clustering.kmeans import Clusters, kmeans
from largescale.clustering.spread_start import spread_start
from largescale.curate.all_rows import all_rows, own_part
from largescale.curate.sampling import first_of_group

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resampling:
    """How a level is clustered.

    Attributes:
        rounds: of resampling; 0 is plain k-means.
        nearest: points taken of each cluster, r; 0 takes half as many as are in a cluster on average.
        iterations: of each k-means, at most.
        spherical: whether points and centroids have length 1.
    """

    rounds: int = 10
    nearest: int = 0
    iterations: int = 20
    spherical: bool = True


def cluster_level(points: Tensor, count: int, how: Resampling, seed: int, *, alone: bool = False) -> Clusters:
    """Cluster the points of all ranks, [n, D] on this one; or of this one `alone`.

    Raises:
        ValueError: on all ranks, if there are fewer points than clusters or points are not finite.

    Collectives: every rank must call it, but for `alone`; per round those of two `kmeans`, and two gatherings of a
        number per point.
    """

    def clustered(some: Tensor, start: Tensor, iterations: int) -> Clusters:
        return kmeans(some, count, seed=seed, iterations=iterations, spherical=how.spherical, alone=alone, start=start)

    found = clustered(points, spread_start(points, count, seed, alone=alone), how.iterations)
    for number in range(1, how.rounds + 1):
        near = nearest_members(_all(found.assignments, alone), _all(found.distances, alone), count, how.nearest)
        if len(near) < count:
            _log.info("resampling ends after %d of %d rounds: some clusters are empty", number - 1, how.rounds)
            break
        own = points[near] if alone else points[own_part(near, len(points))]
        some = clustered(own, spread_start(own, count, seed + number, alone=alone), how.iterations)
        found = clustered(points, some.centroids, 0)
    return found


def nearest_members(clusters: Tensor, distances: Tensor, count: int, nearest: int) -> Tensor:
    """The `nearest` points of each cluster, sorted, int64; see `Resampling`."""
    most = nearest or max(1, len(clusters) // count // 2)
    chosen = first_of_group(clusters.cpu().numpy(), distances.cpu().numpy(), np.full(count, most))
    return torch.from_numpy(np.flatnonzero(chosen)).to(clusters.device)


def _all(rows: Tensor, alone: bool) -> Tensor:
    return rows if alone else all_rows(rows)
