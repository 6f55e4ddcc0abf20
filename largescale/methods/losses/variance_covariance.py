"""VICReg's loss: views alike, dimensions that vary, and no two that vary together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from largescale.methods.float32 import at_least_float32
from largescale.methods.losses.gram import Form, square_of_product
from largescale.methods.losses.over_ranks import Group, gathered

_EPS = 1e-4
"""Added to variances below the square root, whose gradient is infinite at 0."""


class VarianceCovariance(NamedTuple):
    """Terms of the loss, scalars; the means over ranks count.

    Attributes:
        invariance: mean square difference of two views.
        variance: by how much standard deviations are below 1, mean over dimensions and views.
        covariance: sum over views of squared covariances of different dimensions, divided by D.
    """

    invariance: Tensor
    variance: Tensor
    covariance: Tensor

    def loss(self, invariance: float, variance: float, covariance: float) -> Tensor:
        """Their sum with these weights."""
        return invariance * self.invariance + variance * self.variance + covariance * self.covariance


def variance_covariance(
    first: Tensor,
    second: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    form: Form = "auto",
    group: Group = None,
) -> Tensor:
    """The loss of embeddings of two views as the published code of arXiv 2105.04906 has it.

    The naive loop, for B images of all ranks::

        for n in images:
            for j in range(D):
                loss += invariance * (first[n, j] - second[n, j]) ** 2 / (B * D)
        for z in (first, second):
            z = z - z.mean(0)
            for j in range(D):
                loss += variance * max(0, 1 - sqrt(z[:, j] @ z[:, j] / (B - 1) + 1e-4)) / (2 * D)
                for i in range(D):
                    if i != j:
                        loss += covariance * (z[:, i] @ z[:, j] / (B - 1)) ** 2 / D

    The paper differs: its variance term is the sum over views, not the mean, and its invariance term is not divided by
    D.

    Args:
        first, second: embeddings [B / W, D] of this rank's images.
        invariance, variance, covariance: weights of the terms.
        form: how covariances are summed up; see `gram.square_of_product`, and its memory.
        group: ranks with as many other images each; see `over_ranks`. At least two images in all.

    Memory for D = 8192, B = 2048 and float32, forward and backward, beyond the embeddings: 1.6 GB directly and 0.55 GB
    with Gram matrices in one process; 0.45 GB and 0.42 GB on each of 8 ranks, which hold their share of the matrices,
    and three copies of the embeddings of all, 0.13 GB each (gathered, centred, and gradients).

    Collectives: those of `gather_rows`, once, for both views.
    """
    terms = variance_covariance_terms(first, second, form=form, group=group)
    return terms.loss(invariance, variance, covariance)


def variance_covariance_terms(
    first: Tensor, second: Tensor, *, form: Form = "auto", group: Group = None
) -> VarianceCovariance:
    """The terms of `variance_covariance`, unweighted."""
    first, second = at_least_float32(first), at_least_float32(second)
    views = gathered(torch.cat([first, second], dim=1), group).chunk(2, dim=1)
    parts = [_of_view(z, form, group) for z in views]
    hinges, covariances = (torch.stack(part) for part in zip(*parts, strict=True))
    return VarianceCovariance((first - second).square().mean(), hinges.mean(), covariances.sum())


def _of_view(z: Tensor, form: Form, group: Group) -> tuple[Tensor, Tensor]:
    """Variance and covariance terms of a view's embeddings [B, D]."""
    num, width = z.shape
    z = z - z.mean(0)
    variances = z.square().sum(0) / (num - 1)
    hinge = (1 - (variances + _EPS).sqrt()).relu().mean()
    squares = square_of_product(z, z, group, form) / (num - 1) ** 2
    return hinge, (squares - variances.square().sum()) / width
