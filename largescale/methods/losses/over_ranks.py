"""How losses span ranks: each has anchors of its own, and all ranks' rows as candidates.

Every rank passes as many rows as the others. The mean over ranks of what a loss returns, and of its gradients, is what
one process with all rows would have. Without a group a loss takes the rows of this process alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.distributed.collectives import exchanging, gather_rows

Group = dist.ProcessGroup | None


def all_ranks() -> Group:
    """The group of all ranks; None in a process that is alone."""
    return dist.group.WORLD if dist.is_initialized() else None


def gathered(rows: Tensor, group: Group) -> Tensor:
    """Rows [N, ...] of all ranks of a group, with their exact gradient. Collectives: those of `gather_rows`."""
    return rows if group is None else gather_rows(rows, group)


def own_places(num: int, group: Group, device: torch.device) -> Tensor:
    """Where this rank's `num` rows are among the gathered ones, int64 [num]."""
    first = 0 if group is None else dist.get_rank(group) * num
    return torch.arange(first, first + num, device=device)


def mean_of_counted(terms: Tensor, counted: Tensor, group: Group) -> Tensor:
    """The mean of those terms that count, of all ranks together; 0 if none does.

    Ranks have different numbers of them, so the mean of each rank's own mean would be another value.

    Args:
        terms: any shape.
        counted: bool, of the same shape.
        group: ranks with terms of their own.

    Collectives: one all-reduce of a number.
    """
    num, ranks = counted.sum(), 1
    if group is not None and (ranks := dist.get_world_size(group)) > 1:
        with exchanging("number of terms of a loss"):
            dist.all_reduce(num, group=group)
    return torch.where(counted, terms, 0).sum() * ranks / num.clamp_min(1)
