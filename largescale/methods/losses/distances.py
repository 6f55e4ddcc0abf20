"""Distances between this rank's rows and those of all ranks, for losses that compare images in pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from largescale.methods.losses.over_ranks import Group, gathered, own_places

_NEAR = 1e-12
"""Added to squared distances: the square root has no gradient at 0."""


class Distances(NamedTuple):
    """Of N rows to all M rows of the ranks, Euclidean.

    Attributes:
        values: [N, M].
        alike: bool [N, M], which are other rows of the same image.
        different: bool [N, M], which are rows of other images.
    """

    values: Tensor
    alike: Tensor
    different: Tensor


def distances(embeddings: Tensor, ids: Tensor, group: Group) -> Distances:
    """Distances of rows [N, D], and whether they belong to images of the same number, int64 [N].

    Collectives: those of `gather_rows`, twice.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        others, other_ids = gathered(rows, group), gathered(ids, group)
        squares = rows.square().sum(1, keepdim=True) + others.square().sum(1) - 2 * rows @ others.T
        same = ids[:, None] == other_ids
        itself = own_places(len(rows), group, rows.device)[:, None]
        return Distances((squares.clamp_min(0) + _NEAR).sqrt(), same.scatter(1, itself, False), ~same)
