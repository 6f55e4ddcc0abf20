"""Images to look at: a few of every cluster of the top level, and duplicates with what they are duplicates of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from largescale.curate.stages import BucketImages
from largescale.data.random import hash_coordinates

OF_A_CLUSTER, PAIRS = 12, 24
_EXAMPLES = 17
"""Purpose of a random number."""
_MOST_WAITING = 2**18
"""Candidates that may wait until all but the first ones are left out."""


class Examples:
    """Collects examples from bucket after bucket, drawn by hash.

    Attributes:
        pairs: dropped image, kept image, and the cosine; float64 [n, 3].
    """

    def __init__(self, seed: int, parents: Sequence[np.ndarray]) -> None:
        self._seed, self._parents = seed, parents
        self._images = [np.empty((0, 4), np.int64)]  # cluster, hash, sample number, whether it is kept
        self.pairs = np.empty((0, 3))
        self._keys = np.empty(0, np.uint64)

    def add(self, found: BucketImages) -> None:
        """Take what is to be shown of a bucket."""
        clusters = found.clusters
        for above in self._parents:
            clusters = above[clusters]
        keys = hash_coordinates(self._seed, _EXAMPLES, found.samples)
        order = (keys >> np.uint64(1)).astype(np.int64)
        new = np.stack([clusters, order, found.samples, (found.times > 0).astype(np.int64)], 1)
        self._images.append(_first_of_each(new))
        if sum(map(len, self._images[1:])) > max(_MOST_WAITING, len(self._images[0])):
            self._images = [self._first()]
        dropped = np.flatnonzero(found.duplicate_of >= 0)
        pairs = np.stack([found.samples[dropped], found.duplicate_of[dropped], found.cosines[dropped]], 1)
        both, keys = np.concatenate([self.pairs, pairs]), np.concatenate([self._keys, keys[dropped]])
        first = np.argsort(keys, kind="stable")[:PAIRS]
        self.pairs, self._keys = both[first], keys[first]

    def of(self, cluster: int) -> tuple[list[int], list[int]]:
        """Samples of a cluster that are kept, and some that are not."""
        found = self._first()
        own = found[found[:, 0] == cluster]
        return own[own[:, 3] > 0, 2].tolist(), own[own[:, 3] == 0, 2].tolist()

    def _first(self) -> np.ndarray:
        return _first_of_each(np.concatenate(self._images))


def _first_of_each(images: np.ndarray) -> np.ndarray:
    """The first kept and not kept ones of each cluster."""
    images = images[np.lexsort((images[:, 1], images[:, 3], images[:, 0]))]
    group = images[:, 0] * 2 + images[:, 3]
    place = np.arange(len(group)) - np.searchsorted(group, group)
    return images[place < OF_A_CLUSTER]
