"""Sums of squares of products over a batch, from whichever matrix is smaller: D x D, or N x N (Gram matrices).

For rows a and b of N images, the sum of squares of a^T b [D, D] is that of the elements of (a a^T) * (b b^T) [N, N].
Either way each of W ranks computes its share of the rows of that matrix.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.methods.losses.over_ranks import Group

Form = Literal["auto", "direct", "gram"]


def square_of_product(a: Tensor, b: Tensor, group: Group, form: Form = "auto") -> Tensor:
    """W times this rank's share of the sum of squares of a^T b: the mean over ranks is the whole sum.

    Memory, forward and backward, in numbers of the rows' type: about 3 D^2 / W directly, 4 N^2 / W with Gram matrices,
    3 N^2 / W where a and b are the same tensor; besides, N D for the gradient of each.

    Args:
        a, b: rows [N, D] of all ranks, the same on each.
        group: ranks that share the work.
        form: `direct` or `gram`; `auto` takes Gram matrices where N < D.
    """
    num, width = a.shape
    with torch.autocast(a.device.type, enabled=False):
        if form == "gram" or (form == "auto" and num < width):
            own, ranks = _share(num, group)
            gram = a[own] @ a.T
            other = gram if b is a else b[own] @ b.T
            return ranks * (gram * other).sum()
        own, ranks = _share(width, group)
        return ranks * (a[:, own].T @ b).square().sum()


def _share(count: int, group: Group) -> tuple[slice, int]:
    """Which of `count` rows of a matrix this rank computes, and of how many ranks it is one."""
    if group is None:
        return slice(0, count), 1
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    return slice(count * rank // ranks, count * (rank + 1) // ranks), ranks
