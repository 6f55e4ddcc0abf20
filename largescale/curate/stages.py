"""The stages of a curation after images are sorted: duplicates, levels of clusters, what each cluster gives."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.curate.all_rows import all_rows
from largescale.curate.buckets import Buckets
from largescale.curate.duplicates import find_duplicates
from largescale.curate.hierarchy import Resampling, cluster_level
from largescale.curate.sampling import capped, members, shares
from largescale.curate.wish import Wish
from largescale.curate.workshop import Workshop
from largescale.data.random import hash_coordinates
from largescale.processes import on_rank_0, rank, together, world_size
from shards.ground.errors import InputError

_PART, _CLUSTERS, _SEED = 14, 15, 16
"""Purposes of random numbers."""
_LOOKED_AT, _FEWEST, _HALVINGS, _LEAST = 0.1, 5000, 14, 1e-6
"""To find epsilon: the part of the images, and at least how many; how often the range of its logarithm is halved, and
where it begins."""
_FAR = 0.1
"""How far what is dropped may be from the wish, as a share of it, without a warning."""

_log = logging.getLogger(__name__)


def find_epsilon(place: Workshop, buckets: Buckets, centroids: Tensor, wish: Wish) -> float:
    """The smallest epsilon that drops the wanted fraction of images, in coarse clusters with a tenth of them or more.

    Collectives: every rank must call it; an all-reduce of a number per halving, `together` and `on_rank_0`.
    """
    if not place.has("epsilon"):
        chosen = _looked_at(buckets, wish)
        total = int(buckets.sizes[chosen].sum())
        low, high = math.log(_LEAST), 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = _num_dropped(buckets, centroids, chosen, math.exp(middle)) >= wish.fraction * total
            low, high = (low, middle) if enough else (middle, high)
        epsilon, dropped = math.exp(high), _num_dropped(buckets, centroids, chosen, math.exp(high))
        _log.info("epsilon %.3g drops %.1f%% of %s images looked at", epsilon, 100 * dropped / total, f"{total:,}")
        if abs(dropped / total - wish.fraction) > _FAR * wish.fraction:
            _log.warning(
                "no epsilon drops close to %.1f%%: copies that are more alike than others are dropped together",
                100 * wish.fraction,
            )
        on_rank_0(lambda: place.keep("epsilon", epsilon=np.array(epsilon)))
    return float(place.arrays_on_all("epsilon")["epsilon"])


def _looked_at(buckets: Buckets, wish: Wish) -> np.ndarray:
    """Coarse clusters drawn by hash, as many as have enough images."""
    order = np.argsort(hash_coordinates(wish.seed, _PART, np.arange(buckets.count)))
    enough = max(_FEWEST, _LOOKED_AT * int(buckets.sizes.sum()))
    before = buckets.sizes[order].cumsum() - buckets.sizes[order]
    return order[before < enough]


def _num_dropped(buckets: Buckets, centroids: Tensor, chosen: np.ndarray, epsilon: float) -> int:
    """Duplicates in some coarse clusters, which ranks share. Collectives: an all-reduce of a number, and `together`."""
    found = [0]

    def count() -> None:
        for bucket in chosen[rank() :: world_size()].tolist():
            rows = buckets.rows(bucket, centroids.device)
            found[0] += int((find_duplicates(rows, centroids[bucket], epsilon).of >= 0).sum())

    together(count)
    total = torch.tensor(found, device=centroids.device)
    if world_size() > 1:
        dist.all_reduce(total)
    return int(total)


def drop_duplicates(place: Workshop, buckets: Buckets, centroids: Tensor, epsilon: float) -> None:
    """Look for duplicates in every bucket. Collectives: every rank must call it; those of `Workshop.share`."""

    def make(bucket: int) -> None:
        found = find_duplicates(buckets.rows(bucket, centroids.device), centroids[bucket], epsilon)
        place.keep(_dropped(bucket), of=found.of, cosines=found.cosines)

    place.share("looking for duplicates", buckets.largest_first, _dropped, make)


def _dropped(bucket: int) -> str:
    return f"dropped-{bucket:06d}"


def _first(bucket: int) -> str:
    return f"first-{bucket:06d}"


@dataclass(frozen=True)
class BucketImages:
    """What has become of the images of a bucket, in the order of their numbers.

    Attributes:
        samples: their numbers, int64 [n].
        duplicate_of: number of the kept image that an image was dropped for, int64; -1 for a kept one.
        cosines: to that image, float32.
        clusters: of the first level, int64; a dropped image is where that one is. Coarse clusters without levels.
        times: how often it is taken, int64.
    """

    samples: np.ndarray
    duplicate_of: np.ndarray
    cosines: np.ndarray
    clusters: np.ndarray
    times: np.ndarray


class Pile:
    """The images as they are grouped, and what of them is taken."""

    def __init__(self, place: Workshop, buckets: Buckets, wish: Wish, *, deduplicated: bool) -> None:
        self.place, self.buckets, self.wish, self._deduplicated = place, buckets, wish, deduplicated
        self.parents: list[np.ndarray] = []
        self.wanted: np.ndarray | None = None
        self.kept = np.array([self._is_kept(bucket).sum() for bucket in range(buckets.count)], np.int64)
        self.counts = np.zeros(buckets.count, np.int64)
        self.available = int(self.kept.sum())
        if wish.levels:
            self.counts = self._counts(wish.levels[0])

    def _is_kept(self, bucket: int) -> np.ndarray:
        if not self._deduplicated:
            return np.ones(self.buckets.sizes[bucket], bool)
        return np.asarray(self.place.arrays(_dropped(bucket))["of"] < 0)

    def _counts(self, count: int) -> np.ndarray:
        """Clusters of the first level in each bucket: equally many, but no more than images."""
        left = int(self.kept.sum())
        if left < count:
            raise InputError(
                f"--levels: {count:,} clusters of the {left:,} images that are no duplicates; choose fewer"
            )
        keys = hash_coordinates(self.wish.seed, _CLUSTERS, np.arange(len(self.kept)))
        return capped(self.kept, np.zeros(len(self.kept), np.int64), np.array([count]), keys)

    @cached_property
    def _first_clusters(self) -> np.ndarray:
        """Number of the first cluster of each bucket."""
        return self.counts.cumsum() - self.counts

    @property
    def num_lowest(self) -> int:
        """Clusters of the lowest level."""
        return self.wish.levels[0] if self.wish.levels else self.buckets.count

    def cluster(self, device: torch.device) -> None:
        """Find all levels. Collectives: every rank must call it; those of `Workshop.share` and `cluster_level`."""
        self.place.share(
            "clustering images", self.buckets.largest_first, _first, lambda bucket: self._make_first(bucket, device)
        )
        points = self._own_centroids(device)
        for level, count in enumerate(self.wish.levels[1:], 2):
            name = f"level-{level}"
            if not self.place.has(name):
                _log.info("clustering %s centroids into %s", f"{self.wish.levels[level - 2]:,}", f"{count:,}")
                seed = int(hash_coordinates(self.wish.seed, _SEED, level) >> np.uint64(33))
                found = cluster_level(points, count, self.wish.resampling, seed)
                above, centroids = all_rows(found.assignments).cpu().numpy(), found.centroids.cpu().numpy()

                def keep(name: str = name, above: np.ndarray = above, centroids: np.ndarray = centroids) -> None:
                    self.place.keep(name, above=above, centroids=centroids)

                on_rank_0(keep)
            arrays = self.place.arrays_on_all(name)
            self.parents.append(arrays["above"])
            points = torch.from_numpy(np.array_split(arrays["centroids"], world_size())[rank()]).to(device)

    def _make_first(self, bucket: int, device: torch.device) -> None:
        count = int(self.counts[bucket])
        kept = self._is_kept(bucket)
        rows = self.buckets.rows(bucket, device)[torch.from_numpy(kept).to(device)]
        if count < len(rows):
            seed = int(hash_coordinates(self.wish.seed, _SEED, 1, bucket) >> np.uint64(33))
            how = Resampling(0, 0, self.wish.iterations)
            found = cluster_level(rows, count, how, seed, alone=True)
            centroids, clusters, distances = found.centroids, found.assignments.cpu(), found.distances.cpu()
        else:
            centroids, clusters, distances = rows, torch.arange(count), torch.zeros(count)
        self.place.keep(
            _first(bucket),
            centroids=centroids.cpu().numpy(),
            clusters=clusters.numpy().astype(np.int32),
            distances=distances.numpy().astype(np.float32),
        )

    def _own_centroids(self, device: torch.device) -> Tensor:
        """This rank's stretch of the centroids of the first level."""
        ends = self.counts.cumsum()
        owner = np.minimum(np.maximum(ends - 1, 0) * world_size() // max(1, int(ends[-1])), world_size() - 1)
        width = self.buckets.width
        parts = [np.empty((0, width), np.float32)]
        together(
            lambda: parts.extend(
                self.place.arrays(_first(int(bucket)))["centroids"] for bucket in np.flatnonzero(owner == rank())
            )
        )
        return torch.from_numpy(np.concatenate(parts)).to(device)

    def share_out(self) -> None:
        """Find how many images each cluster of the first level is to give; all, if that is what is left."""
        sizes = np.zeros(self.num_lowest, np.int64)
        first = 0
        for bucket, count in enumerate(self.counts.tolist()):
            found = self.place.arrays(_first(bucket))["clusters"]
            sizes[first : first + count] = np.bincount(found, minlength=count)
            first += count
        top = np.arange(len(sizes))
        for above in self.parents:
            top = above[top]
        sizes[np.isin(top, self.wish.without)] = 0
        self.available = int(sizes.sum())
        if not self.available:
            raise InputError("--without: the other clusters of the top level are empty; leave one that gives images")
        target = self.wish.target or self.available
        self.wanted = shares(sizes * self.wish.repeat, self.parents, target, self.wish.seed)

    def images_of(self, bucket: int) -> BucketImages:
        """What has become of a bucket's images."""
        samples = np.array(self.buckets.samples(bucket))
        of, cosines = np.full(len(samples), -1, np.int64), np.zeros(len(samples), np.float32)
        if self._deduplicated:
            arrays = self.place.arrays(_dropped(bucket))
            of, cosines = arrays["of"], arrays["cosines"]
        kept = of < 0
        duplicate_of = np.where(kept, -1, samples[of]) if len(samples) else of
        if self.wanted is None:
            return BucketImages(samples, duplicate_of, cosines, np.full(len(samples), bucket), kept.astype(np.int64))
        first = int(self._first_clusters[bucket])
        arrays = self.place.arrays(_first(bucket))
        own, clusters, times = arrays["clusters"].astype(np.int64), np.zeros_like(of), np.zeros_like(of)
        clusters[kept] = own
        clusters[~kept] = clusters[of[~kept]]
        wanted = self.wanted[first : first + int(self.counts[bucket])]
        distances = arrays["distances"] if self.wish.leaves == "nearest" else None
        times[kept] = members(own, samples[kept], wanted, self.wish.seed, distances)
        return BucketImages(samples, duplicate_of, cosines, first + clusters, times)
