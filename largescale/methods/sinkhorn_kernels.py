"""Sinkhorn-Knopp on CUDA with every score touched once per iteration, in Triton.

With M = exp(scores / epsilon), an iteration takes the column scale u [K] and needs, for every row,

    v = 1 / (M[row] @ u)                    # the row step
    sums += M[row] * v                      # what the next column step needs

so a row that is held between the two lines need not be read again; in torch these are two products with the matrix.
After the last column step, codes are written at once: M[row] * u * v. For n iterations, scores are read n + 1 times
and codes written once; the form in torch reads and writes a matrix 2 n + 6 times.

A program holds one row, and the sums of all its rows, in registers, which bounds K. Its sums go to a row of their own
of `partial`, so the result does not depend on which program comes first.

Only for scores whose exponentials, and products with scaling vectors, stay in float32 (see `sinkhorn`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 2**14
"""Prototypes that a program can hold: 64 KB of sums, a quarter of a multiprocessor's registers."""
_EXPONENT = 35.0
"""Largest |score| / epsilon whose exponential, and all products with scaling vectors, stay in float32."""
_WARPS_A_PROCESSOR = 32
"""That programs put onto each multiprocessor, half of what it holds: their sums and the next row need the registers."""


@triton.jit
def _column_scale(
    sums: tl.tensor,
    prior: tl.tensor,
    num_columns: tl.tensor,
    columns: tl.tensor,
    inside: tl.tensor,
    with_prior: tl.constexpr,
) -> tl.tensor:
    """u [block] of the column step, from sums [K] over all ranks: their mean, or the wanted share of it, over each."""
    total = tl.load(sums + columns, mask=inside, other=0.0)
    wanted = tl.sum(total, axis=0)
    wanted = wanted * tl.load(prior + columns, mask=inside, other=0.0) if with_prior else wanted / num_columns
    return tl.where(inside, wanted / tl.where(inside, total, 1.0), 0.0)


@triton.jit
def _column_sums(
    scores: tl.tensor,
    sums: tl.tensor,
    prior: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    over_epsilon: tl.tensor,
    scaled: tl.constexpr,
    with_prior: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Sums [programs, K] over some of the rows each of M * v; v is 1 unless there are sums of a column step before."""
    program, problem = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, block)
    inside = columns < num_columns
    found = tl.zeros((block,), tl.float32)
    if scaled:
        u = _column_scale(sums + problem * num_columns, prior, num_columns, columns, inside, with_prior)
    start = (problem * num_rows + program).to(tl.int64) * num_columns
    stride = tl.num_programs(0).to(tl.int64) * num_columns
    following = tl.load(scores + start + columns, mask=inside & (program < num_rows), other=0.0)
    for row in range(program, num_rows, tl.num_programs(0)):
        m = tl.where(inside, tl.exp(following.to(tl.float32) * over_epsilon), 0.0)
        start += stride  # the next row comes while this one is worked on
        there = inside & (row + tl.num_programs(0) < num_rows)
        following = tl.load(scores + start + columns, mask=there, other=0.0)
        if scaled:
            m = m * (1.0 / tl.sum(m * u, axis=0))
        found += m
    place = (problem * tl.num_programs(0) + program) * num_columns
    tl.store(partial + place + columns, found, mask=inside)


@triton.jit
def _codes(
    scores: tl.tensor,
    sums: tl.tensor,
    prior: tl.tensor,
    codes: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    over_epsilon: tl.tensor,
    with_prior: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """M * u * v, with v so that rows sum to 1."""
    program, problem = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, block)
    inside = columns < num_columns
    u = _column_scale(sums + problem * num_columns, prior, num_columns, columns, inside, with_prior)
    start = (problem * num_rows + program).to(tl.int64) * num_columns
    stride = tl.num_programs(0).to(tl.int64) * num_columns
    following = tl.load(scores + start + columns, mask=inside & (program < num_rows), other=0.0)
    for row in range(program, num_rows, tl.num_programs(0)):
        m = tl.exp(following.to(tl.float32) * over_epsilon) * u
        there = inside & (row + tl.num_programs(0) < num_rows)
        following = tl.load(scores + start + stride + columns, mask=there, other=0.0)
        tl.store(codes + start + columns, m * (1.0 / tl.sum(m, axis=0)), mask=inside)
        start += stride


def usable(scores: Tensor, epsilon: float) -> bool:
    """Whether the kernels can do it: on CUDA (or in Triton's interpreter), for cosines and few enough prototypes."""
    there = scores.is_cuda or triton.knobs.runtime.interpret
    small = scores.dtype != torch.float64 and scores.shape[-1] <= MOST_COLUMNS
    return bool(there and small and 1 / epsilon <= _EXPONENT)


def column_sums(scores: Tensor, sums: Tensor | None, prior: Tensor | None, epsilon: float) -> Tensor:
    """What a column step needs of this rank's rows: float32 [A, K].

    Args:
        scores: [A, B, K], contiguous, in float32 or less; K at most `MOST_COLUMNS`.
        sums: over all ranks, of the column step before, float32 [A, K]; None before the first, when rows count alike.
        prior: shares of the samples that columns should get, float32 [K]; None: equal ones.
        epsilon: entropy regularisation.
    """
    problems, num_rows, num_columns = scores.shape
    programs = max(1, _programs(scores))
    partial = torch.empty(problems, programs, num_columns, device=scores.device)
    _column_sums[(programs, problems)](
        scores,
        scores if sums is None else sums,
        scores if prior is None else prior,
        partial,
        num_rows,
        num_columns,
        1 / epsilon,
        scaled=sums is not None,
        with_prior=prior is not None,
        **_shape(num_columns),
    )
    return partial.sum(1)


def codes(scores: Tensor, sums: Tensor, prior: Tensor | None, epsilon: float) -> Tensor:
    """Codes float32 [A, B, K] after the last column step, with rows that sum to 1. Arguments as of `column_sums`."""
    problems, num_rows, num_columns = scores.shape
    found = torch.empty(scores.shape, device=scores.device)
    if num_rows:
        programs = _programs(scores)
        _codes[(programs, problems)](
            scores,
            sums,
            scores if prior is None else prior,
            found,
            num_rows,
            num_columns,
            1 / epsilon,
            with_prior=prior is not None,
            **_shape(num_columns),
        )
    return found


def _programs(scores: Tensor) -> int:
    """Per problem: as many as run at the same time, but no more than there are rows."""
    problems, num_rows, num_columns = scores.shape
    processors = torch.cuda.get_device_properties(scores.device).multi_processor_count if scores.is_cuda else 1
    at_once = processors * _WARPS_A_PROCESSOR // _shape(num_columns)["num_warps"]
    return min(num_rows, -(-at_once // problems))


def _shape(num_columns: int) -> dict[str, int]:
    """Of a program: eight scores a thread, up to 512 threads (`benchmarks/sinkhorn_kernels.py` compares others)."""
    block = triton.next_power_of_2(num_columns)
    return {"block": block, "num_warps": min(16, max(4, block // 256))}
