"""Barlow Twins' loss: dimensions of two views' embeddings correlate with themselves and with no other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from largescale.methods.float32 import at_least_float32
from largescale.methods.losses.gram import Form, square_of_product
from largescale.methods.losses.over_ranks import Group, gathered

_EPS = 1e-5
"""Added to variances, as by the BatchNorm of the published code."""


class CrossCorrelation(NamedTuple):
    """Terms of the loss, scalars.

    Attributes:
        diagonal: the sum of (1 - c[i, i])^2.
        off_diagonal: the sum of c[i, j]^2 with i != j; the mean over ranks counts.
    """

    diagonal: Tensor
    off_diagonal: Tensor

    def loss(self, off_diagonal: float) -> Tensor:
        """Their sum, the second one weighted."""
        return self.diagonal + off_diagonal * self.off_diagonal


def cross_correlation(
    first: Tensor, second: Tensor, *, off_diagonal: float = 0.0051, form: Form = "auto", group: Group = None
) -> Tensor:
    """The loss of embeddings of two views (arXiv 2103.03230).

    The naive loop, for B images of all ranks::

        a, b = ((z - z.mean(0)) / sqrt(z.var(0, correction=0) + 1e-5) for z in (first, second))
        for i in range(D):
            for j in range(D):
                c = sum(a[n, i] * b[n, j] for n in images) / B
                loss += (1 - c) ** 2 if i == j else off_diagonal * c**2

    Args:
        first, second: embeddings [B / W, D] of this rank's images.
        off_diagonal: weight of correlations between different dimensions.
        form: how these are summed up; see `gram.square_of_product`, and its memory.
        group: ranks with as many other images each; see `over_ranks`.

    Returns:
        A scalar; 0 where both views have the same, uncorrelated dimensions.

    Memory for D = 8192, B = 2048 and float32, forward and backward, beyond the embeddings: 1.5 GB directly and 0.7 GB
    with Gram matrices in one process. From 8 ranks on 0.7 GB either way: each holds its share of the matrices, and five
    copies of the embeddings of all, 0.13 GB each (gathered, standardised, and their gradients).

    Collectives: those of `gather_rows`, once, for both views.
    """
    return cross_correlation_terms(first, second, form=form, group=group).loss(off_diagonal)


def cross_correlation_terms(
    first: Tensor, second: Tensor, *, form: Form = "auto", group: Group = None
) -> CrossCorrelation:
    """The terms of `cross_correlation`, unweighted."""
    rows = gathered(at_least_float32(torch.cat([first, second], dim=1)), group)
    a, b = (_standardised(z) for z in rows.chunk(2, dim=1))
    num = len(rows)
    diagonal = (a * b).sum(0) / num
    squares = square_of_product(a, b, group, form) / num**2
    return CrossCorrelation((1 - diagonal).square().sum(), squares - diagonal.square().sum())


def _standardised(z: Tensor) -> Tensor:
    """Rows [B, D] with mean 0 and variance 1 in each dimension."""
    variance, mean = torch.var_mean(z, dim=0, correction=0)
    return (z - mean) * (variance + _EPS).rsqrt()
