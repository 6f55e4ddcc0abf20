"""What queries make of candidates that are not learnt, such as a queue: the part of a softmax that is large."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = {"cpu": 512, "cuda": 2**14}
"""Queries in a block, by type of device."""
_NUMBERS = {"cpu": 2**18, "cuda": 2**26}
"""Products in a block: 1 MB in float32, which a processor's cache holds, and 256 MB."""


class LogSum(NamedTuple):
    """Of the products of N queries with their candidates.

    Attributes:
        log_sum: logarithm of the sum of exponentials [N]; -inf of a query without candidates.
        largest: [N], without a gradient.
    """

    log_sum: Tensor
    largest: Tensor


def log_sum_exp(queries: Tensor, candidates: Tensor, excluded: Tensor | None = None) -> LogSum:
    """The largest product of each query with the candidates, and the logarithm of the sum of their exponentials.

    The naive loop::

        for i in range(N):
            products = [queries[i] @ candidates[k] for k in range(K) if k != excluded[i]]
            log_sum[i], largest[i] = log(sum(exp(products))), max(products)

    The products would take N * K numbers, and as many again for exponentials and their gradients. Here a block of them
    goes all the way, the sum is kept relative to the largest product so far, and the gradient of a query, the mean of
    the candidates by their softmax, is added up along with it: one more [N, D], which serves one backward pass.

    Args:
        queries: [N, D].
        candidates: [K, D]; they get no gradient.
        excluded: a place among the candidates that does not count for a query, int64 [N]; others than 0 to K - 1
            exclude none.

    Collectives: none.
    """
    with_gradient = torch.is_grad_enabled() and queries.requires_grad
    with torch.autocast(queries.device.type, enabled=False):
        return LogSum(*_LogSumExp.apply(queries, candidates.detach(), excluded, with_gradient))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, excluded: Tensor | None, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        log_sum, largest = queries.new_empty(len(queries)), queries.new_empty(len(queries))
        means = torch.empty_like(queries) if with_gradient else None
        rows = _of_device(_ROWS, queries)
        for start in range(0, len(queries), rows):
            block = slice(start, start + rows)
            _rows(
                queries[block],
                candidates,
                None if excluded is None else excluded[block, None],
                log_sum[block],
                largest[block],
                None if means is None else means[block],
            )
        ctx.means = means
        ctx.mark_non_differentiable(largest)
        return log_sum, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.means is None:
            raise RuntimeError("log_sum_exp: the gradient was already taken, and is kept for one backward pass")
        means, ctx.means = ctx.means, None
        return means.mul_(outer[:, None]), None, None, None


def _rows(
    queries: Tensor, candidates: Tensor, excluded: Tensor | None, log_sum: Tensor, largest: Tensor, means: Tensor | None
) -> None:
    """Fill in the last three, [n], [n] and [n, D], of a block of n queries."""
    largest.fill_(-math.inf)
    total = torch.zeros_like(largest)
    if means is not None:
        means.zero_()
    columns = max(1, _of_device(_NUMBERS, queries) // len(queries))
    for start in range(0, len(candidates), columns):
        some = candidates[start : start + columns].to(queries.dtype)
        products = queries @ some.T
        if excluded is not None:
            places = excluded - start
            here = places.clamp(0, len(some) - 1)
            products.scatter_(1, here, products.gather(1, here).masked_fill(places == here, -math.inf))
        new = torch.maximum(largest, products.amax(1))
        base = new.masked_fill(new == -math.inf, 0)  # none so far: their exponentials are 0, not NaN
        shrink = (largest - base).exp()
        weights = products.sub_(base[:, None]).exp_()
        total.mul_(shrink).add_(weights.sum(1))
        if means is not None:
            means.mul_(shrink[:, None]).addmm_(weights, some)
        largest.copy_(new)
    torch.add(largest.masked_fill(largest == -math.inf, 0), total.log(), out=log_sum)
    if means is not None:
        means.div_(total.masked_fill(total == 0, 1)[:, None])


def _of_device(sizes: dict[str, int], tensor: Tensor) -> int:
    return sizes.get(tensor.device.type, sizes["cuda"])
