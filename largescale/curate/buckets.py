"""Embeddings sorted by coarse cluster, so that similar images can be read together without reading all.

Coarse clusters are found on a sample, drawn by hash. Then every row is written once more, in the file of a few shards
(`sorted-...`), by its nearest coarse centroid; a bucket is the rows of one coarse cluster from all of these files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from largescale.clustering.kmeans import kmeans, nearest_centroids
from largescale.clustering.spread_start import spread_start
from largescale.curate.embeddings import Embeddings, FeatureFile, unit_rows
from largescale.curate.wish import Wish
from largescale.curate.workshop import Workshop
from largescale.data.random import hash_coordinates
from largescale.processes import on_rank_0, rank, together, world_size

_FILE_BYTES, _PARTS, _LEAST_ROWS = 2**28, 64, 8192
"""Rows of a sorted file: so many bytes at most, but for a shard that has more; in this part of all or less, so that
ranks can share the work; and as many as this."""
_SAMPLED = 13
"""Purpose of a random number."""


def groups_of_files(embeddings: Embeddings) -> list[list[FeatureFile]]:
    """Neighbouring files that become one sorted file; no matter how many ranks there are."""
    fit = _FILE_BYTES // (embeddings.width * embeddings.dtype.itemsize)
    most = max(_LEAST_ROWS, min(fit, embeddings.num_images // _PARTS))
    groups: list[list[FeatureFile]] = []
    rows = 0
    for file in embeddings.files:
        if not groups or rows + file.num_images > most:
            groups.append([])
            rows = 0
        groups[-1].append(file)
        rows += file.num_images
    return groups


def own_files(embeddings: Embeddings) -> list[FeatureFile]:
    """This rank's files: a stretch of all, about as many images as the others'."""
    ends = np.cumsum([file.num_images for file in embeddings.files])
    last = np.maximum(ends - 1, 0)  # the first shards may have no image that could be read
    owner = np.minimum(last * world_size() // max(1, ends[-1]), world_size() - 1)
    return [file for file, its in zip(embeddings.files, owner.tolist(), strict=True) if its == rank()]


def coarse_centroids(place: Workshop, embeddings: Embeddings, wish: Wish, device: torch.device) -> Tensor:
    """Centroids of the coarse clusters, float32 [K, D], on all ranks.

    Collectives: every rank must call it; those of `kmeans`.
    """
    if not place.has("coarse"):
        points = together(lambda: _sample(embeddings, wish, device))
        count = wish.num_coarse(embeddings.num_images)
        start = spread_start(points, count, wish.seed)
        found = kmeans(
            points, count, seed=wish.seed, iterations=wish.iterations, spherical=True, start=start
        ).centroids.cpu()
        on_rank_0(lambda: place.keep("coarse", centroids=found.numpy()))
    return torch.from_numpy(place.arrays_on_all("coarse")["centroids"]).to(device)


def _sample(embeddings: Embeddings, wish: Wish, device: torch.device) -> Tensor:
    """This rank's part of the images that coarse clusters are found on."""
    share = wish.num_sampled(embeddings.num_images) / embeddings.num_images
    limit = np.uint64(min(2**64 - 1, int(share * 2**64)))
    found = [torch.empty(0, embeddings.width, device=device)]
    for file in own_files(embeddings):
        drawn = hash_coordinates(wish.seed, _SAMPLED, file.samples()) <= limit
        start = 0
        for block in file.blocks():
            chosen = drawn[start : start + len(block)]
            start += len(block)
            if chosen.any():
                found.append(unit_rows(block[chosen], device))
    return torch.cat(found)


def sort_rows(place: Workshop, embeddings: Embeddings, centroids: Tensor) -> Buckets:
    """Write the rows sorted by coarse cluster. Collectives: every rank must call it; those of `Workshop.share`."""
    groups = groups_of_files(embeddings)

    def make(number: int) -> None:
        # A shard may have no image that could be read.
        blocks = [np.empty((0, embeddings.width), embeddings.dtype)]
        samples, clusters = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for file in groups[number]:
            samples.append(file.samples())
            for block in file.blocks():
                blocks.append(block)
                clusters.append(nearest_centroids(unit_rows(block, centroids.device), centroids).cpu().numpy())
        cluster = np.concatenate(clusters)
        order = np.argsort(cluster, kind="stable")
        place.keep_rows(f"{_name(number)}", np.concatenate(blocks)[order])
        place.keep_rows(f"{_name(number)}-samples", np.concatenate(samples)[order])
        place.keep(_name(number), ends=np.cumsum(np.bincount(cluster, minlength=len(centroids))))

    place.share("sorting images by coarse cluster", range(len(groups)), _name, make)
    return Buckets(place, len(groups), len(centroids), embeddings.width)


def _name(number: int) -> str:
    return f"sorted-{number:06d}"


@dataclass(frozen=True)
class Buckets:
    """The rows of each coarse cluster, in the order of their sample numbers."""

    place: Workshop
    num_files: int
    count: int
    width: int

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each bucket begins and ends in each file, int64 [files, count + 1]."""
        ends = np.zeros((self.num_files, self.count + 1), np.int64)
        for number in range(self.num_files):
            ends[number, 1:] = self.place.arrays(_name(number))["ends"]
        return ends

    @cached_property
    def sizes(self) -> np.ndarray:
        """Images in each bucket, int64."""
        return np.diff(self._ends, axis=1).sum(0)

    @property
    def largest_first(self) -> list[int]:
        """Numbers of the buckets, in an order in which ranks can share them evenly."""
        return [int(number) for number in np.argsort(-self.sizes, kind="stable")]

    def samples(self, bucket: int) -> np.ndarray:
        """Sample numbers of a bucket, int64 [n]."""
        return self._of("-samples", bucket)

    def rows(self, bucket: int, device: torch.device) -> Tensor:
        """Rows of a bucket, of length 1, float32 [n, D]."""
        return unit_rows(self._of("", bucket), device)

    def _of(self, kind: str, bucket: int) -> np.ndarray:
        ends = self._ends[:, bucket : bucket + 2].tolist()
        parts = [self.place.rows(f"{_name(number)}{kind}", *its) for number, its in enumerate(ends) if its[0] < its[1]]
        return np.concatenate(parts or [self.place.rows(f"{_name(0)}{kind}", 0, 0)])
