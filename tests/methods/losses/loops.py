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
