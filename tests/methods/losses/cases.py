"""Losses as functions of this rank's part [2, B, D] of two views of a batch, and the naive loop of each over all rows.

A loss that spans ranks is a line in CASES; `test_over_ranks` compares it with one process on 2 and 4 ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from largescale.methods.losses import (
    contrastive_margin,
    cosine,
    cross_correlation,
    info_nce,
    nt_xent,
    triplet,
    variance_covariance,
)
from largescale.methods.losses.over_ranks import Group

IMAGES, WIDTH = 8, 5

Case = Callable[[Tensor, Tensor, Group], Tensor]
"""From views [2, B, D], the numbers of their images [B] and a group."""


def embeddings() -> Tensor:
    """Two views [2, IMAGES, WIDTH] of all images, alike but for noise, float64."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(1, IMAGES, WIDTH, generator=generator, dtype=torch.float64)
    return images + torch.randn(2, IMAGES, WIDTH, generator=generator, dtype=torch.float64)


def identities() -> Tensor:
    """Numbers of the images; one is in the batch twice, on different ranks."""
    return torch.tensor([4, 1, 7, 3, 0, 2, 4, 5])


def _rows(loss: Callable[..., Tensor], views: Tensor, ids: Tensor, group: Group, **options: object) -> Tensor:
    return loss(views.flatten(0, 1), ids.repeat(2), group=group, **options)


def _of_two_views(loss: Callable[..., Tensor], views: Tensor, ids: Tensor, group: Group, **options: object) -> Tensor:
    return loss(*views, group=group, **options)


def _queue(views: Tensor, ids: Tensor, group: Group) -> Tensor:
    others = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return info_nce(views[0], views[1], others, group=group)


CASES: dict[str, tuple[Case, int, int]] = {
    "nt_xent": (lambda views, ids, group: nt_xent(views, group=group), 1, 1),
    "info_nce": (lambda views, ids, group: info_nce(views[0], views[1], group=group), 1, 1),
    "info_nce, several views": (
        lambda views, ids, group: info_nce(views.flatten(0, 1), views[1] ** 2, group=group),
        1,
        1,
    ),
    "info_nce, queue": (_queue, 0, 0),
    "contrastive_margin": (partial(_rows, contrastive_margin, margin=3.0), 3, 1),
    "contrastive_margin, active": (partial(_rows, contrastive_margin, margin=3.0, over="active"), 3, 1),
    "cosine": (lambda views, ids, group: cosine(views**3, views), 0, 0),
    "cross_correlation, direct": (partial(_of_two_views, cross_correlation, off_diagonal=0.1, form="direct"), 1, 1),
    "cross_correlation, gram": (partial(_of_two_views, cross_correlation, off_diagonal=0.1, form="gram"), 1, 1),
    "variance_covariance, direct": (partial(_of_two_views, variance_covariance, form="direct"), 1, 1),
    "variance_covariance, gram": (partial(_of_two_views, variance_covariance, form="gram"), 1, 1),
    "triplet, batch_hard": (partial(_rows, triplet, margin=0.5), 3, 1),
    "triplet, semi_hard": (partial(_rows, triplet, margin=0.5, mining="semi_hard"), 3, 1),
}
"""By name: the loss, and how many collectives it takes forward and backward."""
