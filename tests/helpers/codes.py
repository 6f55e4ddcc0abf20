"""Sinkhorn-Knopp as it is defined, and scores for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def oracle(scores: Tensor, epsilon: float, iterations: int, prior: Tensor | None = None) -> Tensor:
    """Sinkhorn-Knopp on logarithms in float64, all rows in one process."""
    logits = scores.double() / epsilon
    row = torch.zeros_like(logits[..., :, :1])
    for _ in range(iterations):
        column = -torch.logsumexp(logits + row, dim=-2, keepdim=True)
        if prior is not None:
            column = column + prior.log()
        row = -torch.logsumexp(logits + column, dim=-1, keepdim=True)
    return torch.exp(logits + column + row)


def cosines(num_rows: int, num_prototypes: int, seed: int, dim: int = 16) -> Tensor:
    """Of random unit vectors with each other, [num_rows, num_prototypes]."""
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(num_rows, dim, generator=generator), dim=1)
    prototypes = normalize(torch.randn(num_prototypes, dim, generator=generator), dim=1)
    return rows @ prototypes.T
