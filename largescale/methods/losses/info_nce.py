"""InfoNCE, the loss of MoCo and many others."""

from __future__ import annotations

from torch import Tensor

from largescale.methods.joint_embedding import unit
from largescale.methods.losses.over_ranks import Group
from largescale.methods.losses.picks import among_batch, among_others


def info_nce(
    queries: Tensor, keys: Tensor, others: Tensor | None = None, *, temperature: float = 0.1, group: Group = None
) -> Tensor:
    """Every query picks the key of its image (arXiv 1807.03748; with cosines, 1911.05722).

    The naive loop, for unit vectors q and k of N images::

        for i in images:
            wrong = others or [k[n] for n in images if n != i]
            mine = exp(q[i] @ k[i] / temperature)
            loss += -log(mine / (mine + sum(exp(q[i] @ n / temperature) for n in wrong))) / N

    Args:
        queries: embeddings [B, D] of this rank's images, of any length; cosines are compared. Or [V * B, D] of several
            views, view after view.
        keys: embeddings [B, D] of the same images. They may take a gradient.
        others: wrong candidates [K, D], such as a queue of earlier keys, the same on all ranks; without them, the keys
            of the other images of all ranks.
        temperature: divides cosines.
        group: ranks with B other images each; see `over_ranks`.

    Returns:
        A scalar. Equal embeddings cost ln(K + 1), or ln N.

    Raises:
        ValueError: queries are not those of one or several views of the images that keys are of.

    Collectives: without `others`, those of `gather_rows`, once.
    """
    shapes = f"queries of shape {tuple(queries.shape)} and keys of shape {tuple(keys.shape)}"
    if keys.dim() != 2 or queries.shape[1:] != keys.shape[1:] or len(queries) < len(keys) or len(queries) % len(keys):
        raise ValueError(f"{shapes}: expected [V * B, D] and [B, D]")
    queries, keys = unit(queries), unit(keys)
    if others is not None:
        return among_others(queries, keys, unit(others), temperature).loss()
    return among_batch(queries, keys, temperature, group).loss()
