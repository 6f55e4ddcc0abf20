"""Sums of unit rows by cluster that follow what moves, without a pass over all rows.

A row is rounded to multiples of 2^-32 and added as int64; what was added is subtracted exactly. So the sums are those
of the rows that are there, in whatever order they came and went, and equal on all ranks. They hold 2^30 rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

from largescale.distributed.collectives import exchanging
from largescale.processes import world_size

_UNIT = 2.0**-32


class SumsByCluster(nn.Module):
    """Sums and sizes of clusters, the same on all ranks.

    Args:
        width: of a row, D.

    Attributes:
        totals: sums in fixed point, and sizes last, int64 [K, D + 1].
    """

    totals: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("totals", torch.zeros(0, width + 1, dtype=torch.int64), persistent=False)

    def make_room(self, count: int) -> None:
        """Take memory for so many clusters, all empty."""
        self.totals = self.totals.new_zeros(count, self.totals.shape[1])

    @property
    def sizes(self) -> Tensor:
        """Rows in each cluster, int64 [K]."""
        return self.totals[:, -1]

    def add(self, rows: Tensor, clusters: Tensor) -> None:
        """Add rows, the same ones on all ranks, to their clusters. Collectives: none.

        Args:
            rows: entries of at most 1, [n, D].
            clusters: of rows, -1 for one that is left out, int64 [n].
        """
        _add(self.totals, rows, clusters, 1)

    def subtract(self, rows: Tensor, clusters: Tensor) -> None:
        """Take away what `add` has added. Collectives: none."""
        _add(self.totals, rows, clusters, -1)

    def move_over_ranks(self, rows: Tensor, former: Tensor, clusters: Tensor) -> None:
        """Move rows, each rank its own, from one cluster to another; -1 is none.

        Collectives: an all-reduce of K (D + 1) numbers.
        """
        change = torch.zeros_like(self.totals)
        _add(change, rows, former, -1)
        _add(change, rows, clusters, 1)
        if world_size() > 1:
            with exchanging("sums by cluster"):
                dist.all_reduce(change)
        self.totals += change

    def means_into(self, centroids: Tensor) -> None:
        """Replace centroids [K, D] by the means of their rows at length 1; of empty clusters they stay."""
        means = normalize(self.totals[:, :-1].double(), dim=1).to(centroids.dtype)
        centroids.copy_(torch.where(means.any(1, keepdim=True), means, centroids))

    def by_name(self) -> dict[str, Tensor]:
        """What goes into a checkpoint."""
        return {"sums": self.totals}


def _add(totals: Tensor, rows: Tensor, clusters: Tensor, sign: int) -> None:
    counted = clusters >= 0
    exact = torch.ones(len(rows), totals.shape[1], dtype=torch.int64, device=rows.device)
    exact[:, :-1] = (rows.double() / _UNIT).round_().long()
    totals.index_add_(0, clusters.clamp_min(0), torch.where(counted[:, None], sign * exact, 0))
