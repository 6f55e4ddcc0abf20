"""Splits of labelled samples that depend on their ids alone: equal on any number of ranks and in any order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from largescale.data.few_labels import by_hash, stratified_rows
from largescale.processes import on_rank_0
from shards.ground.files import atomic_write

_HELD_OUT = 11
"""Purpose of random numbers: splits of one kind say nothing of those of the other, `few_labels.LOW_SHOT`."""


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
    return torch.from_numpy(stratified_rows(ids.numpy(), labels.numpy(), share, seed))


def keep_subset(folder: Path, ids: Tensor, kind: str) -> Path:
    """Write samples to a file that a stream takes as `data.subset`, named after them: measurements of other training
    shards may go on at the same time. Collectives: one broadcast.

    Args:
        folder: made if it is not there.
        ids: of the samples, int64 [N].
        kind: the name begins with it.
    """
    numbers = ids.numpy()
    path = folder / f"{kind}-{xxhash.xxh3_64_hexdigest(numbers.tobytes())}.npy"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.save(file, numbers)

    on_rank_0(write)
    return path


def _by_hash(ids: Tensor, seed: int, purpose: int) -> Tensor:
    """Rows in the order of a hash of their ids."""
    return torch.from_numpy(by_hash(ids.numpy(), seed, purpose))
