"""The triplet loss, with triplets mined among the rows of all ranks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from largescale.methods.losses.distances import Distances, distances
from largescale.methods.losses.over_ranks import Group, mean_of_counted


def triplet(
    embeddings: Tensor,
    ids: Tensor,
    *,
    margin: float = 0.2,
    mining: Literal["batch_hard", "semi_hard"] = "batch_hard",
    group: Group = None,
) -> Tensor:
    """An anchor is to be nearer to rows of its image than to rows of others, by a margin.

    The naive loop, for distances d(i, j) = |z[i] - z[j]|::

        for a in rows:
            partners = [j for j in rows if j != a and ids[j] == ids[a]]
            others = [j for j in rows if ids[j] != ids[a]]
            if mining == "batch_hard":          # arXiv 1703.07737: the farthest partner, the nearest other
                triplets = [(max(partners by d(a, j)), min(others by d(a, j)))]
            else:                               # arXiv 1503.03832: the nearest other that is farther than the partner
                triplets = [(p, min(n in others with d(a, n) > d(a, p) by d(a, n))) for p in partners]
            for p, n in triplets:
                loss += max(0, d(a, p) - d(a, n) + margin)
        loss /= number of active triplets, those whose term is not 0

    Rows without a partner, or without an other that qualifies, make no triplet.

    Args:
        embeddings: [N, D].
        ids: which image each row shows, int64 [N].
        margin: in units of distance.
        mining: how triplets are chosen.
        group: ranks with N other rows each; see `over_ranks`. Candidates and the number of active triplets are of all.

    Returns:
        A scalar; 0 if no triplet is active.

    Raises:
        ValueError: for another `mining`.

    Collectives: those of `gather_rows`, twice, and one all-reduce of a number.
    """
    if mining not in _MINING:
        raise ValueError(f"mining={mining}: expected {' or '.join(_MINING)}")
    near, far = _MINING[mining](distances(embeddings, ids, group))
    terms = near - far + margin
    return mean_of_counted(terms, terms > 0, group)


def _batch_hard(found: Distances) -> tuple[Tensor, Tensor]:
    """Distances [N] of the farthest partners and of the nearest others."""
    near = found.values.masked_fill(~found.alike, -math.inf).max(1).values
    return near, found.values.masked_fill(~found.different, math.inf).min(1).values


def _semi_hard(found: Distances) -> tuple[Tensor, Tensor]:
    """Distances [N, M] of all partners, and of the nearest others beyond each; infinite where there is none."""
    far = found.values.masked_fill(~found.different, math.inf).sort(1).values
    beyond = torch.searchsorted(far.detach(), found.values.detach().contiguous(), right=True)
    far = far.gather(1, beyond.clamp_max(far.shape[1] - 1)).masked_fill(beyond == far.shape[1], math.inf)
    return found.values.masked_fill(~found.alike, -math.inf), far


_MINING = {"batch_hard": _batch_hard, "semi_hard": _semi_hard}
