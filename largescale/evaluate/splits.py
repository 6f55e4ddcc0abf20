"""Splits of labelled samples that depend on their ids alone: equal on any number of ranks and in any order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from largescale.data.random import hash_coordinates

_HELD_OUT, _LOW_SHOT = 11, 12
"""Purposes of random numbers: splits of one kind say nothing of those of the other."""


def held_out(ids: Tensor, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to fit on, and rows to choose on (at least one): int64, ascending.

    Args:
        ids: of the samples, int64 [N], at least two.
        share: of the rows that is held out.
        seed: of the split.
    """
    order = _by_hash(ids, seed, _HELD_OUT)
    num_held = min(len(ids) - 1, max(1, int(share * len(ids))))
    return order[num_held:].sort().values, order[:num_held].sort().values


def stratified(ids: Tensor, labels: Tensor, share: float, seed: int) -> Tensor:
    """Rows of a share of each class, at least one per class that has samples: int64, ascending.

    Splits of one seed are nested: those of 1% are among those of 10%.

    Args:
        ids: of the samples, int64 [N].
        labels: int64 [N].
        share: of each class, rounded.
        seed: of the split.
    """
    order = _by_hash(ids, seed, _LOW_SHOT)
    chosen = []
    for label in labels.unique().tolist():
        own = order[labels[order] == label]
        chosen.append(own[: max(1, round(share * len(own)))])
    return torch.cat(chosen).sort().values


def _by_hash(ids: Tensor, seed: int, purpose: int) -> Tensor:
    """Rows in the order of a hash of their ids."""
    keys = hash_coordinates(seed, purpose, ids.numpy())
    return torch.from_numpy(np.lexsort((ids.numpy(), keys)))
