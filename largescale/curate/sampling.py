"""Balanced sampling from a tree of clusters: what is frequent is cut, what is rare is kept.

From the top: the children of a cluster that is to give n images give min(c, size) each, with the integer cap c for
which that is n or just below; what is missing is made up by one image more from some of those cut, drawn by a hash.
"Automatic Data Curation for Self-Supervised Learning" (Vo et al., 2024), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from largescale.data.random import hash_coordinates

_SHARES, _MEMBERS = 11, 12
"""Purposes of random numbers."""


def shares(sizes: np.ndarray, parents: Sequence[np.ndarray], target: int, seed: int) -> np.ndarray:
    """How many images each cluster of the lowest level gives, int64 [K_1]; in sum `target`, or all that there are.

    Args:
        sizes: images in each cluster of the lowest level, int64 [K_1].
        parents: for each level but the top one, from the lowest up: the cluster above, int64 [K_t].
        target: images to sample.
        seed: of what is drawn.
    """
    all_sizes = [sizes]
    for level, above in enumerate(parents, 1):
        # Clusters may be empty, the last ones too.
        count = len(parents[level]) if level < len(parents) else int(above.max(initial=-1)) + 1
        all_sizes.append(np.bincount(above, all_sizes[-1], minlength=count).astype(np.int64))
    wanted = np.array([target], np.int64)
    for level in range(len(parents), -1, -1):
        own = all_sizes[level]
        above = parents[level] if level < len(parents) else np.zeros(len(own), np.int64)
        wanted = capped(own, above, wanted, hash_coordinates(seed, _SHARES, level, np.arange(len(own))))
    return wanted


def capped(sizes: np.ndarray, groups: np.ndarray, targets: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What each cluster gives so that every group of them gives its target, int64 [n].

    Args:
        sizes: of clusters, int64 [n].
        groups: group of each, int64 [n].
        targets: of groups, int64 [G]; a group smaller than its target gives all.
        keys: decide which of the cut clusters give one more, uint64 [n]: those with the smallest.
    """
    num = len(targets)

    def given(caps: np.ndarray) -> np.ndarray:
        # In float64, which counts exactly up to 2^53.
        return np.bincount(groups, np.minimum(sizes, caps[groups]), minlength=num)[:num].astype(np.int64)

    low, high = np.zeros(num, np.int64), np.full(num, sizes.max(initial=0) + 1)
    while (high - low > 1).any():  # low fits, high does not, or is more than any size
        middle = (low + high) // 2
        fits = given(middle) <= targets
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    missing = targets - given(low)
    cut = np.flatnonzero(sizes > low[groups])
    found = np.minimum(sizes, low[groups])
    found[cut[first_of_group(groups[cut], keys[cut], missing)]] += 1
    return found


def first_of_group(groups: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which items are among the first `counts` [G] of their group by key, bool [n]; ties by position."""
    order = np.lexsort((keys, groups))
    ordered = groups[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    chosen = np.zeros(len(groups), bool)
    chosen[order] = place < counts[ordered]
    return chosen


def members(
    clusters: np.ndarray, samples: np.ndarray, wanted: np.ndarray, seed: int, distances: np.ndarray | None = None
) -> np.ndarray:
    """How often each image is taken, int64 [n]: once or never, unless its cluster is to give more than it has.

    Args:
        clusters: of images, int64 [n].
        samples: numbers of the images, int64 [n].
        wanted: images that each cluster gives, int64 [K].
        seed: of what is drawn.
        distances: to the centroids, [n]: the nearest images are taken; None draws by a hash of the sample's number.
    """
    keys = hash_coordinates(seed, _MEMBERS, samples) if distances is None else distances
    sizes = np.maximum(np.bincount(clusters, minlength=len(wanted)), 1)
    times = (wanted // sizes)[clusters]
    return times + first_of_group(clusters, keys, wanted % sizes)
