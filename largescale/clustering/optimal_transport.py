"""Clusters of equal size for the points of all ranks: labels by optimal transport, as in published self-labelling
(arXiv 1911.05371, section 3).

Of N points with probabilities P over K clusters; alpha and beta make the sums of rows 1 / N, those of columns 1 / K::

    Q = diag(alpha) P^power diag(beta)
    beta = 1
    repeat:
        alpha = 1 / N / (P^power @ beta)
        in every 10th iteration, stop if sum |(alpha before) / alpha - 1| < tolerance
        beta = 1 / K / (alpha @ P^power)
    label of point i = argmax of Q[i]

The rule is the published one: a sum over points, so the same tolerance is stricter for more of them. Published code
starts from alpha = 1 / N instead, and has no limit of iterations.

What is the same for a row of P^power goes into alpha, what is the same for a column into beta. So it is taken as
exp(power scores - a number per column - a number per row) in float64, of at most 1 and at least e^-600.

The result is the same bits for any number of ranks, as long as points have the same order: scores and products are
computed in blocks of one shape, and sums of columns are exact. Shares of a point in each cluster are at most 1, so they
are rounded to multiples of a power of two and added as int64.

Memory: 8 K bytes per point of this rank, and some blocks; see `working_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from largescale.clustering.fixed_point import NotFinite, sums_by_group
from largescale.processes import world_size

_BITS = 62
_LEAST_EXPONENT = -600.0
_BLOCK = 2**20
"""Numbers in a block; 8 MB."""
_CHECK = 10
"""Iterations from one check to the next, as published, and from one word to the next."""
_OF_A_POINT = 80
"""Bytes: sums of two iterations, what adds up their differences, labels."""


@dataclass(frozen=True)
class EqualClusters:
    """Found by `equal_clusters`.

    Attributes:
        labels: cluster of each of this rank's points, int64 [n].
        sizes: points of all ranks with each label, int64 [K]; nearly equal, since the best cluster of each point is
            taken instead of its shares in all.
        error: sum over the points of all ranks of how much the last iteration changed the scale of a point's row,
            relative to that.
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
        iterations: at most, whatever the error; at least 2.
        beat: told what is being done; all ranks call it equally often, so it may exchange, and end this by raising.

    Raises:
        NotFinite: on all ranks, if scores are not finite.
        ValueError: on all ranks, if there are fewer points than clusters.

    Collectives: every rank must call it; an all-reduce of two numbers, two of K and one more per iteration; in every
        10th iteration those of `sums_by_group`; those of `beat`.
    """
    count, own = len(weights), len(features)
    kernel = _logarithms(features, weights.double(), biases.double(), power)
    num = _checked_total(kernel, own)
    beta, scale = _exponentiate(kernel, own), kernel.new_ones(())
    sums = kernel.new_empty(kernel.shape[:2])
    for iteration in range(1, iterations + 1):
        if iteration % _CHECK == 1:
            beat(f"{count} equal clusters, iteration {iteration}")
        check = iteration == iterations or (iteration % _CHECK == 1 and iteration > 1)
        before = sums.clone() if check else sums
        relative = _relative_masses(kernel, beta, num, sums)
        if check:
            error = _total_change(before.flatten()[:own], sums.flatten()[:own] * scale)
            if error < tolerance:
                break
        beta /= relative
        scale = beta.max()
        beta /= scale
    labels = _likeliest(kernel, beta, own)
    sizes = labels.new_zeros(count).index_add_(0, labels, torch.ones_like(labels))
    _add_up(sizes)
    return EqualClusters(labels, sizes, error, iteration)


def working_bytes(num_points: int, count: int) -> int:
    """Most bytes that `equal_clusters` holds at a time beside features.

    Args:
        num_points: of this rank.
        count: clusters.
    """
    rows = _rows(count)
    return 8 * count * (-(-num_points // rows) + 5) * rows + _OF_A_POINT * num_points


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


def _checked_total(kernel: Tensor, own: int) -> int:
    """Points of all ranks, once it is known that they can be labelled. Collectives: an all-reduce of two numbers."""
    totals = torch.tensor([own, 0], device=kernel.device)
    for block in kernel:  # of all at once it would take more than the kernel itself
        totals[1] += (~block.isfinite()).sum()
    _add_up(totals)
    num, bad = totals.tolist()
    if bad:
        raise NotFinite(f"{bad:,} scores are not finite")
    if num < kernel.shape[2]:
        raise ValueError(f"{num} points for {kernel.shape[2]} clusters")
    return num


def _relative_masses(kernel: Tensor, beta: Tensor, num: int, sums: Tensor) -> Tensor:
    """Sums of columns over 1 / K, once rows have equal ones, [K]; puts `kernel @ beta` into `sums` [blocks, rows].

    Collectives: an all-reduce of K numbers.
    """
    unit = 2.0 ** (_BITS - num.bit_length())
    masses = torch.zeros(len(beta), dtype=torch.int64, device=kernel.device)
    for block, found in zip(kernel, sums, strict=True):
        shares = block * beta
        found.copy_(torch.mv(block, beta))
        shares /= torch.where(found > 0, found, 1)[:, None]  # rows of padding are 0
        masses += (shares * unit).round_().long().sum(0)
    _add_up(masses)
    # A cluster that nobody comes near has at least one unit.
    return masses.clamp_min(1).double() / unit * (len(beta) / num)


def _total_change(before: Tensor, after: Tensor) -> float:
    """Sum of all ranks' relative differences, the same bits on any number of them. Collectives: `sums_by_group`'s."""
    changes = (after / before - 1).abs_()
    return float(sums_by_group(changes, torch.zeros_like(changes, dtype=torch.int64), 1))


def _likeliest(kernel: Tensor, beta: Tensor, own: int) -> Tensor:
    labels = torch.empty(kernel.shape[:2], dtype=torch.int64, device=kernel.device)
    for block, found in zip(kernel, labels, strict=True):
        found.copy_((block * beta).argmax(1))
    return labels.flatten()[:own]


def _add_up(numbers: Tensor) -> None:
    if world_size() > 1:
        dist.all_reduce(numbers)
