"""The contrastive loss with a margin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from largescale.methods.losses.distances import distances
from largescale.methods.losses.over_ranks import Group, mean_of_counted


def contrastive_margin(
    embeddings: Tensor, ids: Tensor, *, margin: float = 1.0, over: Literal["all", "active"] = "all", group: Group = None
) -> Tensor:
    """Rows of an image attract each other; rows of different images repel each other up to a distance, the margin.

    The naive loop (Hadsell et al., 2006, without its factor of 1/2), for embeddings z and distances d = |z[i] - z[j]|::

        for i in rows:
            for j in rows if j != i:
                loss += d**2 if ids[i] == ids[j] else max(0, margin - d) ** 2
        loss /= number of pairs                 # over="active": of those whose term is not 0

    Args:
        embeddings: [N, D]. For unit vectors d**2 = 2 - 2 cos, and a margin above 2 means no more than 2.
        ids: which image each row shows, int64 [N].
        margin: distance from which on different images are left alone.
        over: pairs that the mean is over.
        group: ranks with N other rows each; see `over_ranks`.

    Returns:
        A scalar.

    Raises:
        ValueError: for another `over`.

    Collectives: those of `gather_rows`, twice, and one all-reduce of a number.
    """
    if over not in ("all", "active"):
        raise ValueError(f"over={over}: expected all or active")
    values, alike, different = distances(embeddings, ids, group)
    near = different & (values < margin)
    terms = torch.where(alike, values.square(), (margin - values).clamp_min(0).square())
    return mean_of_counted(terms, alike | (near if over == "active" else different), group)
