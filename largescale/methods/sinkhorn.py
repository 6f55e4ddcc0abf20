"""Distributed Sinkhorn-Knopp: soft assignments with equal use of all prototypes, or any other, over all ranks.

Source: SwAV, arXiv 2006.09882, section 3 and appendix; the convention of its published code (column step first, row
step last, so rows sum to one exactly and columns nearly to B / K).

Two observations make it cheap and safe:

- The assignment is diag(v) * exp(scores / epsilon) * diag(u), so iterating on the scaling vectors u [K] and v [B] is
  enough: one exponential, two matrix-vector products an iteration, the matrix rewritten once at the end, and only u
  needs other ranks. Global normalisations cancel. A row step and the next column step need a row once, so both are done
  on a block of rows while the cache holds it: a look at every score per iteration.
- Where exp(scores / epsilon) would leave the range of the floating-point numbers, the first column and row step are
  done on logarithms. After them every entry is at most 1, every row sums to 1 and every column sum lies in [1/K, B],
  whatever epsilon is, and the scaling vectors take over. Ranks can only add numbers, not logarithms: where one range of
  exponents does not hold all that cosines may have, each rank adds to the range that its own sum is in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.distributed.collectives import exchanging

_PRODUCT_EXPONENT = 35.0
"""Largest |score| / epsilon whose exponential, and all products with scaling vectors, stay in float32."""

_SUM_EXPONENT = {torch.float32: 75.0, torch.float64: 690.0}
"""Largest |score| / epsilon whose exponential can be summed over 4e5 rows in each precision."""

_BLOCK_NUMBERS = 2**18
"""Scores of a block of rows for each thread of a CPU: 1 MB in float32, about what a core's own cache holds."""

_RANGE_EXPONENT = 600.0
"""Half of the exponents that one of several ranges holds, with room for the number of rows, and for ranks."""


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float,
    iterations: int,
    prior: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    check_range: bool = True,
    fused: bool = False,
) -> Tensor:
    """Assignments of samples to prototypes under the equal-partition constraint.

    The naive form, on the rows of all ranks together::

        Q = exp(scores / epsilon)                      # [B, K]
        for _ in range(iterations):
            Q = Q / Q.sum(dim=0) * prior               # every prototype used as it should be
            Q = Q / Q.sum(dim=1, keepdim=True)         # every sample assigned once

    Args:
        scores: cosines of samples and prototypes, [B_local, K], or [A, B_local, K] for A independent problems
            (assign crops x heads) that share their collectives. B_local may differ between ranks, and be 0.
        epsilon: entropy regularisation; smaller is sharper.
        iterations: column and row steps, at least 1.
        prior: shares of the samples that prototypes should get, [K], positive with a sum of 1; None: equal ones.
        group: ranks that hold the rows; None is the default group, or this process alone where there is none.
        check_range: look for scores outside the representable range (reads one number back from the device).
        fused: by the kernels of `sinkhorn_kernels` where they can do it, and `check_range` is off; the same but for
            roundings. Elsewhere it changes nothing.

    Returns:
        Codes of the shape of `scores`, in float32 (float64 for float64 scores), computed in that precision under
        any autocast; rows sum to 1.

    Raises:
        ValueError: in a group of several ranks, scores / epsilon beyond what their sums can represent. Cosines fit
            for any epsilon.

    Collectives:
        Every rank of `group` must call it. Exactly `iterations` all-reduces of A * K numbers each (none in a group
        of one): float32, but float64 for float64 scores and, for the first one, where epsilon is below 1/75; below
        1/690 that first one has 1 / (600 * epsilon) times more numbers, rounded up.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: expected at least 1")
    if fused and not check_range and _kernels_usable(scores, epsilon):
        packed = scores if scores.dim() == 3 else scores[None]
        return _by_kernels(packed, epsilon, iterations, prior, group).view(scores.shape)
    with torch.autocast(scores.device.type, enabled=False):
        precision = torch.float64 if scores.dtype == torch.float64 else torch.float32
        packed = scores if scores.dim() == 3 else scores[None]
        # What ranks exchange must not depend on the scores that each has, so epsilon alone decides it.
        wire = torch.float64 if 1 / epsilon > _SUM_EXPONENT[torch.float32] else precision
        fits = 1 / epsilon <= _PRODUCT_EXPONENT
        if check_range:
            fits = _check_range(packed, epsilon, wire, fits, group)
        codes = _empty(packed, precision)
        if fits:
            column_sums, done = _exponentials(packed, codes, epsilon), 0
        else:
            logits = torch.div(packed.to(precision), epsilon, out=codes)
            log_sums = _log_column_sums(logits, wire, 1 / epsilon, group)
            if prior is not None:
                log_sums = log_sums - prior.log().to(log_sums)
            codes = torch.softmax(logits.sub_(log_sums[:, None]), dim=-1)
            column_sums, done = codes.sum(1), 1
        for step in range(done, iterations):
            _all_reduce(column_sums, group)
            column_scale = _column_scale(column_sums, prior).to(precision)
            column_sums = _row_step(codes, column_scale, last=step + 1 == iterations)
        return codes.view(scores.shape)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of the shape of `like`, on its device."""
    if type(like) is Tensor and like.device.type == "cpu":  # not one that only plans memory
        # NumPy asks the kernel for large pages where an array has megabytes: the first touch of ordinary ones, 4 KB
        # each, takes as long as two iterations.
        return torch.from_numpy(np.empty(like.shape, np.float64 if dtype == torch.float64 else np.float32))
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _check_range(
    scores: Tensor, epsilon: float, wire: torch.dtype, fits: bool, group: dist.ProcessGroup | None
) -> bool:
    """Whether exponentials of scores [A, B_local, K] stay in the range of the numbers; of several ranks as for cosines.

    Raises:
        ValueError: ranks cannot sum them.
    """
    largest = float(torch.stack(scores.aminmax()).abs().max()) / epsilon if scores.numel() else 0.0
    if _group_size(group) == 1:
        return largest <= _PRODUCT_EXPONENT
    if largest > (_PRODUCT_EXPONENT if fits else max(_SUM_EXPONENT[wire], 1 / epsilon)) * (1 + 1e-6):
        raise ValueError(
            f"scores reach {largest * epsilon:.4g} in absolute value at epsilon={epsilon:.4g}: their "
            f"exponentials cannot be summed over ranks; pass cosines (normalise features and prototypes) "
            f"or use a larger epsilon"
        )
    return fits


def _blocks(matrices: Tensor) -> Iterator[tuple[int, slice]]:
    """Places in [A, B_local, K] of blocks of rows that fit into a CPU's caches; elsewhere whole matrices."""
    num_rows = matrices.shape[1]
    if matrices.device.type == "cpu":
        num_rows = max(1, _BLOCK_NUMBERS * torch.get_num_threads() // max(1, matrices.shape[2]))
    for number in range(len(matrices)):
        for first in range(0, matrices.shape[1], max(1, num_rows)):
            yield number, slice(first, first + num_rows)


def _exponentials(scores: Tensor, out: Tensor, epsilon: float) -> Tensor:
    """exp(scores / epsilon) of [A, B_local, K] to `out`, and its column sums [A, K]."""
    sums = out.new_zeros(out.shape[0], out.shape[2])
    for number, rows in _blocks(out):
        block = out[number, rows]
        # Powers of 2 take half the time of torch.exp on CPUs without a vector library of their maker.
        torch.mul(scores[number, rows].to(out.dtype), math.log2(math.e) / epsilon, out=block).exp2_()
        sums[number].addmv_(block.T, block.new_ones(len(block)))
    return sums


def _row_step(codes: Tensor, column_scale: Tensor, *, last: bool) -> Tensor:
    """Scale rows to a sum of 1, where columns are scaled [A, K]: the sums of columns [A, K] then, before they are
    scaled. The codes are rewritten in the last step alone.
    """
    sums = torch.zeros_like(column_scale)
    for number, rows in _blocks(codes):
        block, scale = codes[number, rows], column_scale[number]
        row_scale = torch.mv(block, scale).reciprocal_()
        if last:
            block.mul_(scale).mul_(row_scale[:, None])
        else:
            sums[number].addmv_(block.T, row_scale)
    return sums


def _kernels_usable(scores: Tensor, epsilon: float) -> bool:
    try:
        from largescale.methods.sinkhorn_kernels import usable
    except ImportError:  # no Triton, as on machines without a GPU; torch for CUDA comes with it
        return False
    return usable(scores, epsilon)


def _by_kernels(
    scores: Tensor, epsilon: float, iterations: int, prior: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    """The same of [A, B_local, K], with a look at each score per iteration."""
    from largescale.methods.sinkhorn_kernels import codes, column_sums  # needs Triton

    scores, sums = scores.contiguous(), None
    shares = None if prior is None else prior.to(scores.device, torch.float32)
    for _ in range(iterations):
        sums = column_sums(scores, sums, shares, epsilon)
        _all_reduce(sums, group)
    assert sums is not None
    return codes(scores, sums, shares, epsilon)


def _column_scale(column_sums: Tensor, prior: Tensor | None) -> Tensor:
    """What columns [A, K] are multiplied with, from their sums over all ranks."""
    # The mean keeps the total as it is; without it the two scales would drift apart by B / K an iteration.
    wanted = column_sums.mean(-1, keepdim=True)
    if prior is not None:
        wanted = wanted * (prior * len(prior)).to(wanted)
    return wanted / column_sums


def _log_column_sums(logits: Tensor, wire: torch.dtype, reach: float, group: dist.ProcessGroup | None) -> Tensor:
    """log of the sums of exp(logits) over the rows of all ranks: [A, B_local, K] to [A, K].

    `reach` is the largest logit of a cosine. Logarithms up to that are cut into ranges: a rank adds exp(its logarithm -
    middle) to the range that holds it, and 0 to the others, so one all-reduce of sums is enough and nothing is lost.
    """
    local = torch.logsumexp(logits, dim=1)
    if _group_size(group) == 1:
        return local
    local = local.to(wire)
    num_ranges = 1 if reach <= _SUM_EXPONENT[wire] else math.ceil(reach / _RANGE_EXPONENT)
    width = 2 * reach / num_ranges
    middles = (torch.arange(num_ranges, dtype=wire, device=local.device) + 0.5) * width - reach
    number = ((local + reach) / width).floor().nan_to_num(0).clamp(0, num_ranges - 1).long()
    sums = torch.zeros(num_ranges, *local.shape, dtype=wire, device=local.device)
    sums.scatter_(0, number[None], torch.exp(local - middles[number])[None])
    _all_reduce(sums, group)
    return torch.logsumexp(torch.log(sums) + middles[:, None, None], dim=0).to(logits.dtype)


def _all_reduce(values: Tensor, group: dist.ProcessGroup | None) -> None:
    if _group_size(group) > 1:
        with exchanging("Sinkhorn's marginals"):
            dist.all_reduce(values, group=group)


def _group_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
