"""Which of the labelled samples a share of the labels is: balanced over classes, a function of sample numbers alone."""

from __future__ import annotations

import numpy as np

from largescale.data.random import hash_coordinates

LOW_SHOT = 12
"""Purpose of the random numbers, beside those of `evaluate/splits.py`."""


def stratified_rows(ids: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Rows of a share of each class, at least one per class that has samples: int64, ascending.

    Shares of one seed are nested: those of 1% are among those of 10%.

    Args:
        ids: of the samples, int64 [N].
        labels: int64 [N].
        share: of each class, rounded.
        seed: of the choice.
    """
    order = by_hash(ids, seed, LOW_SHOT)
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, first, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    wanted = np.maximum(1, np.rint(share * sizes)).astype(np.int64)  # halves to even, as `round`
    return np.sort(by_class[np.arange(len(by_class)) - first.repeat(sizes) < wanted.repeat(sizes)])


def by_hash(ids: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Rows in the order of a hash of their ids."""
    return np.lexsort((ids, hash_coordinates(seed, purpose, ids)))
