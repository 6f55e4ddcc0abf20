"""How far predictions point away from the embeddings of an image's other views."""

from __future__ import annotations

import torch
from torch import Tensor

from largescale.methods.joint_embedding import unit


def cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of 1 - cos over images and pairs of different views: 0 if all agree, 2 if they are opposed.

    The naive loop::

        for a in range(A):
            for v in range(V):
                if v != a:
                    loss += (1 - cos(predictions[v], targets[a])).mean()
        loss /= A * (V - 1)

    BYOL's loss of two views is 4 times this, SimSiam's is this less 1. Targets get a gradient unless they are detached.
    In float32 at least, outside autocast.

    Args:
        predictions: of V views of the same images [V, B, D].
        targets: of the first A of these views [A, B, D].

    Source: BYOL, arXiv 2006.07733, equation 2.

    Collectives: none; the mean over ranks of their losses is that of all images.
    """
    p, t = unit(predictions), unit(targets)
    with torch.autocast(p.device.type, enabled=False):
        num = len(t)
        # All pairs less those of a view with itself.
        total = (p.sum(0) * t.sum(0)).sum() - (p[:num] * t).sum()
        return 1 - total / (num * (len(p) - 1) * p.shape[1])
