"""How alike two clusterings of the same points are, whatever numbers their clusters have.

    n[a][b] = points in cluster a of the first and in b of the second; n[a], n[b] its sums over b and over a; N all
    nmi = 2 I / (H1 + H2),  I = sum n[a][b] / N log(n[a][b] N / (n[a] n[b])),  H1 = -sum n[a] / N log(n[a] / N)
    kept = sum over a of max over b of n[a][b] / N

Of the table n only what is not 0 is made and exchanged, so many rows at a time that it has about 4 million points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.distributed.collectives import all_gather
from largescale.processes import world_size

_BLOCK = 2**22
"""Points whose pairs of clusters are exchanged at a time, if clusters are of equal size; 64 MB at most."""


class Agreement(NamedTuple):
    """Of two clusterings.

    Attributes:
        nmi: normalised mutual information, by the mean of both entropies; 1 if they are equal but for the numbers.
        kept: share of the points that stay with the largest part of their first cluster.
    """

    nmi: float
    kept: float


@torch.no_grad()
def agreement(
    first: Tensor, second: Tensor, num_first: int, num_second: int, beat: Callable[[str], None] = lambda what: None
) -> Agreement | None:
    """Compare the clusters of all ranks' points; None if no point has two. The same bits on any number of ranks.

    Args:
        first, second: cluster of each of this rank's points, -1 for none, int64 [n]. Points without one are left out.
        num_first, num_second: of the clusters.
        beat: told what is being done; all ranks call it equally often, so it may exchange, and end this by raising.

    Collectives: every rank must call it; an all-reduce of a number; for every 4 million points one more, and an
        all-gather of two numbers for each different pair of clusters that a rank has; those of `beat`.
    """
    both = (first >= 0) & (second >= 0)
    pairs, counts = (first[both].long() * num_second + second[both]).unique(return_counts=True)
    total = _over_ranks(len(first[both]), first.device, dist.ReduceOp.SUM)
    if not total:
        return None
    rows = -(-num_first // -(-total // _BLOCK))
    of_second = torch.zeros(num_second, dtype=torch.int64, device=first.device)
    joint, entropy, kept = (torch.zeros((), dtype=torch.float64, device=first.device) for _ in range(3))
    for start in range(0, num_first, rows):
        beat(f"comparing clusters with the last ones, {start} of {num_first}")
        here = (pairs >= start * num_second) & (pairs < (start + rows) * num_second)
        found, sizes = _of_all_ranks(pairs[here], counts[here], start * num_second)
        places = found // num_second - start
        of_second.index_add_(0, found % num_second, sizes)
        joint += _n_log_n(sizes)
        entropy += _n_log_n(sizes.new_zeros(rows).index_add_(0, places, sizes))
        kept += sizes.new_zeros(rows).scatter_reduce_(0, places, sizes, "amax").sum()
    log_total = torch.tensor(total, dtype=torch.float64).log().item()
    h_joint, h1, h2 = (log_total - float(part) / total for part in (joint, entropy, _n_log_n(of_second)))
    return Agreement(2 * (h1 + h2 - h_joint) / (h1 + h2) if h1 + h2 > 1e-12 else 1.0, float(kept) / total)


def _of_all_ranks(pairs: Tensor, counts: Tensor, any_pair: int) -> tuple[Tensor, Tensor]:
    """Different pairs of all ranks in order, and how often they come. Collectives: an all-reduce and an all-gather."""
    if world_size() == 1:
        return pairs, counts
    most = _over_ranks(len(pairs), pairs.device, dist.ReduceOp.MAX)
    own = pairs.new_zeros(2, most)
    own[0, : len(pairs)], own[0, len(pairs) :] = pairs, any_pair  # of no points
    own[1, : len(pairs)] = counts
    gathered = own.new_empty(world_size(), 2, most)
    if most:
        all_gather(gathered.view(-1), own.view(-1))
    found, places = gathered[:, 0].flatten().unique(return_inverse=True)
    sizes = found.new_zeros(len(found)).index_add_(0, places, gathered[:, 1].flatten())
    return found[sizes > 0], sizes[sizes > 0]  # else sums of more numbers, and so other bits


def _over_ranks(number: int, device: torch.device, operation: dist.ReduceOp.RedOpType) -> int:
    found = torch.tensor(number, device=device)
    if world_size() > 1:
        dist.all_reduce(found, op=operation)
    return int(found)


def _n_log_n(counts: Tensor) -> Tensor:
    return torch.special.xlogy(counts.double(), counts.double()).sum()
