"""How alike two clusterings of the same points are, whatever numbers their clusters have.

    n[a][b] = points in cluster a of the first and in b of the second; n[a], n[b] its sums over b and over a; N all
    nmi = 2 I / (H1 + H2),  I = sum n[a][b] / N log(n[a][b] N / (n[a] n[b])),  H1 = -sum n[a] / N log(n[a] / N)
    kept = sum over a of max over b of n[a][b] / N

The table n is made and exchanged in blocks of rows, as it may be large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.processes import world_size

_BLOCK = 2**22
"""Numbers of the table that are exchanged at a time; 32 MB."""


class Agreement(NamedTuple):
    """Of two clusterings.

    Attributes:
        nmi: normalised mutual information, by the mean of both entropies; 1 if they are equal but for the numbers.
        kept: share of the points that stay with the largest part of their first cluster.
    """

    nmi: float
    kept: float


@torch.no_grad()
def agreement(first: Tensor, second: Tensor, num_first: int, num_second: int) -> Agreement | None:
    """Compare the clusters of all ranks' points; None if no point has two.

    Args:
        first, second: cluster of each of this rank's points, -1 for none, int64 [n]. Points without one are left out.
        num_first, num_second: of the clusters.

    Collectives: every rank must call it; all-reduces of num_first * num_second numbers, 4 million at a time.
    """
    both = (first >= 0) & (second >= 0)
    pairs, counts = (first[both].long() * num_second + second[both]).unique(return_counts=True)
    rows = max(1, _BLOCK // num_second)
    of_second = torch.zeros(num_second, dtype=torch.int64, device=first.device)
    joint, entropy, kept = (torch.zeros((), dtype=torch.float64, device=first.device) for _ in range(3))
    for start in range(0, num_first, rows):
        size = min(rows, num_first - start)
        table = torch.zeros(size * num_second, dtype=torch.int64, device=first.device)
        here = (pairs >= start * num_second) & (pairs < (start + size) * num_second)
        table[pairs[here] - start * num_second] = counts[here]
        if world_size() > 1:
            dist.all_reduce(table)
        whole = table.view(size, num_second)
        of_second += whole.sum(0)
        joint += _n_log_n(whole)
        entropy += _n_log_n(whole.sum(1))
        kept += whole.amax(1).sum()
    total = int(of_second.sum())
    if not total:
        return None
    log_total = torch.tensor(total, dtype=torch.float64).log().item()
    h_joint, h1, h2 = (log_total - float(part) / total for part in (joint, entropy, _n_log_n(of_second)))
    return Agreement(2 * (h1 + h2 - h_joint) / (h1 + h2) if h1 + h2 > 1e-12 else 1.0, float(kept) / total)


def _n_log_n(counts: Tensor) -> Tensor:
    return torch.special.xlogy(counts.double(), counts.double()).sum()
