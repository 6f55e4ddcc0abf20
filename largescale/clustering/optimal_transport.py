"""Clusters of equal size for the points of all ranks: labels by optimal transport, as in published self-labelling
(arXiv 1911.05371, section 3).

Of N points with probabilities P over K clusters; alpha and beta make the sums of rows 1 / N, those of columns 1 / K::

    Q = diag(alpha) P^power diag(beta)
    repeat until sum |beta / (beta before) - 1| < tolerance:
        alpha = 1 / N / (P^power @ beta)
        beta = 1 / K / (alpha @ P^power)
    label of point i = argmax of Q[i]

What is the same for a row of P^power goes into alpha, what is the same for a column into beta. So it is taken as
exp(power scores - a number per column - a number per row) in float64, of at most 1 and at least e^-600.

The result is the same bits for any number of ranks, as long as points have the same order: scores and products are
computed in blocks of one shape, and sums of columns are exact. Shares of a point in each cluster are at most 1, so they
are rounded to multiples of a power of two and added as int64.

Memory: 8 K bytes per point of this rank, and a block; see `working_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from largescale.processes import world_size

_BITS = 62
_LEAST_EXPONENT = -600.0
_BLOCK = 2**20
"""Numbers in a block; 8 MB."""
_BEAT = 10
"""Iterations from one word to the next."""


@dataclass(frozen=True)
class EqualClusters:
    """Found by `equal_clusters`.

    Attributes:
        labels: cluster of each of this rank's points, int64 [n].
        sizes: points of all ranks with each label, int64 [K]; nearly equal, since the best cluster of each point is
            taken instead of its shares in all.
        error: sum over clusters of how far the last shares were from 1 / K, relative to that.
        iterations: that it took.
    """

    labels: Tensor
    sizes: Tensor
    error: float
    iterations: int


@torch.no_grad()
def equal_clusters(
    features: Tensor,
    weights: Tensor,
    biases: Tensor,
    *,
    power: float,
    tolerance: float,
    iterations: int,
    beat: Callable[[str], None] = lambda what: None,
) -> EqualClusters:
    """Label the points of all ranks by the scores that a linear layer gives them.

    Args:
        features: of this rank's points, [n, F]. Ranks may have different numbers.
        weights, biases: of the layer, [K, F] and [K], the same on all ranks.
        power: of the probabilities; larger is closer to the largest score of each point.
        tolerance: error at which it stops.
        iterations: at most, whatever the error.
        beat: told what is being done; all ranks call it equally often, so it may exchange, and end this by raising.

    Raises:
        ValueError: on all ranks, if there are fewer points than clusters, or scores are not finite.

    Collectives: every rank must call it; an all-reduce of two numbers, two of K and one more per iteration; those of
        `beat`.
    """
    count = len(weights)
    kernel = _logarithms(features, weights.double(), biases.double(), power)
    rows = kernel.flatten(0, 1)[: len(features)]
    totals = torch.stack([torch.tensor(len(features), device=kernel.device), (~rows.isfinite()).sum()])
    _add_up(totals)
    num, bad = totals.tolist()
    if bad:
        raise ValueError("scores are not finite")
    if num < count:
        raise ValueError(f"{num} points for {count} clusters")
    unit = 2.0 ** (_BITS - num.bit_length())
    beta = _exponentiate(kernel, len(features))
    for iteration in range(1, iterations + 1):
        if iteration % _BEAT == 1:
            beat(f"{count} equal clusters, iteration {iteration}")
        masses = torch.zeros(count, dtype=torch.int64, device=kernel.device)
        for block in kernel:
            shares = block * beta
            sums = torch.mv(block, beta)
            shares /= torch.where(sums > 0, sums, 1)[:, None]  # rows of padding are 0
            masses += (shares * unit).round_().long().sum(0)
        _add_up(masses)
        # A cluster that nobody comes near has at least one unit.
        relative = masses.clamp_min(1).double() / unit * (count / num)
        error = float((relative - 1).abs().sum())
        if error < tolerance:
            break
        beta /= relative
        beta /= beta.max()
    labels = torch.cat([masses[:0], *((block * beta).argmax(1) for block in kernel)])[: len(features)]
    sizes = labels.new_zeros(count).index_add_(0, labels, torch.ones_like(labels))
    _add_up(sizes)
    return EqualClusters(labels, sizes, error, iteration)


def working_bytes(num_points: int, count: int) -> int:
    """Most bytes that `equal_clusters` holds at a time beside features.

    Args:
        num_points: of this rank.
        count: clusters.
    """
    return 8 * count * (num_points + 5 * _rows(count)) + 8 * num_points


def _rows(count: int) -> int:
    return max(64, min(4096, _BLOCK // count))


def _logarithms(features: Tensor, weights: Tensor, biases: Tensor, power: float) -> Tensor:
    """Logarithms of the powers of probabilities but for a number per row, float64 [blocks, rows, K]."""
    rows, num = _rows(len(weights)), len(features)
    found = features.new_zeros(-(-num // rows), rows, len(weights), dtype=torch.float64)
    for block, whole in zip(features.split(rows), found, strict=True) if num else ():
        padded = pad(block.double(), (0, 0, 0, rows - len(block)))
        whole.copy_(torch.addmm(biases, padded, weights.T).mul_(power))
        whole -= whole.amax(1, keepdim=True)
    return found


def _exponentiate(kernel: Tensor, num: int) -> Tensor:
    """Powers of probabilities in place, scaled by column and by row; rows behind `num` become 0.

    Returns:
        What undoes the scaling of columns, [K]: beta at the start.

    Collectives: an all-reduce of K numbers.
    """
    rows = kernel.flatten(0, 1)
    rows[num:] = -torch.inf
    largest = rows.amax(0) if num else rows.new_full(rows.shape[1:], -torch.inf)
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    for block in kernel:
        block -= largest
        block -= block.amax(1, keepdim=True)
        block.clamp_min_(_LEAST_EXPONENT).exp_()
    rows[num:] = 0  # also of what came of padding
    return largest.clamp_min(_LEAST_EXPONENT).exp()


def _add_up(numbers: Tensor) -> None:
    if world_size() > 1:
        dist.all_reduce(numbers)
