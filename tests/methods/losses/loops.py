"""Naive loops of losses, a pair at a time, and how a loss is compared with one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize


def assert_same(loss_of: Callable[[Tensor], Tensor], loop: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Values to 1e-12 and gradients to 1e-9, in float64."""
    leaf = at.detach().clone().requires_grad_()
    loss, expected = loss_of(leaf), loop(leaf)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    [own], [theirs] = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def nt_xent_loop(z: Tensor, temperature: float) -> Tensor:
    """Of views [V, N, D]."""
    z = normalize(z, dim=-1)
    num_views, num = z.shape[:2]
    total = z.new_zeros(())
    for i in range(num):
        for v in range(num_views):
            others = [
                torch.exp(z[v, i] @ z[w, n] / temperature) for n in range(num) if n != i for w in range(num_views)
            ]
            for w in set(range(num_views)) - {v}:
                mine = torch.exp(z[v, i] @ z[w, i] / temperature)
                total = total - torch.log(mine / (mine + sum(others)))
    return total / (num * num_views * (num_views - 1))


def info_nce_loop(queries: Tensor, keys: Tensor, others: Tensor | None, temperature: float) -> Tensor:
    """Of queries and keys [N, D], and shared candidates [K, D] or those of the batch."""
    queries, keys = normalize(queries, dim=-1), normalize(keys, dim=-1)
    total = queries.new_zeros(())
    for i, query in enumerate(queries):
        wrong = [key for n, key in enumerate(keys) if n != i] if others is None else list(normalize(others, dim=-1))
        mine = torch.exp(query @ keys[i] / temperature)
        total = total - torch.log(mine / (mine + sum(torch.exp(query @ key / temperature) for key in wrong)))
    return total / len(queries)


def cross_correlation_loop(views: Tensor, off_diagonal: float) -> Tensor:
    """Of two views [2, N, D], an entry of the correlations at a time."""
    num, width = views.shape[1:]
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in views)
    total = views.new_zeros(())
    for i in range(width):
        for j in range(width):
            c = sum(a[n, i] * b[n, j] for n in range(num)) / num
            total = total + ((1 - c) ** 2 if i == j else off_diagonal * c**2)
    return total


def variance_covariance_loop(views: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """Of two views [2, N, D], an entry of the covariances at a time."""
    num, width = views.shape[1:]
    total = views.new_zeros(())
    for n in range(num):
        for j in range(width):
            total = total + invariance * (views[0, n, j] - views[1, n, j]) ** 2 / (num * width)
    for view in views:
        z = view - view.mean(0)
        for j in range(width):
            deviation = (z[:, j] @ z[:, j] / (num - 1) + 1e-4).sqrt()
            total = total + variance * (1 - deviation).clamp_min(0) / (2 * width)
            for i in range(width):
                if i != j:
                    total = total + covariance * (z[:, i] @ z[:, j] / (num - 1)) ** 2 / width
    return total
