"""NT-Xent, the loss of SimCLR."""

from __future__ import annotations

from torch import Tensor

from largescale.methods.joint_embedding import unit
from largescale.methods.losses.over_ranks import Group
from largescale.methods.losses.picks import among_views


def nt_xent(views: Tensor, temperature: float = 0.1, *, group: Group = None) -> Tensor:
    """Every view picks each other view of its image among it and the views of all other images.

    The naive loop, for unit vectors z[v][i] of V views of N images::

        for i in images:
            for v in views:
                others = sum(exp(z[v][i] @ z[w][n] / temperature) for n in images if n != i for w in views)
                for w in views if w != v:
                    mine = exp(z[v][i] @ z[w][i] / temperature)
                    loss += -log(mine / (mine + others)) / (N * V * (V - 1))

    Two views make the loss of SimCLR (arXiv 2002.05709, section 2.1); more make its form for multi-crop in VISSL, with
    the views of all ranks among the others.

    Args:
        views: embeddings [V, B, D] of this rank's images, of any length; cosines are compared.
        temperature: divides them.
        group: ranks with B other images each; see `over_ranks`.

    Returns:
        A scalar. Equal embeddings cost ln(1 + V (N - 1)).

    Raises:
        ValueError: there are not two views or more.

    Collectives: those of `gather_rows`, once.
    """
    if views.dim() != 3 or len(views) < 2:
        raise ValueError(f"views of shape {tuple(views.shape)}: expected [V, B, D] with two views or more")
    return among_views(unit(views), temperature, group).loss()
