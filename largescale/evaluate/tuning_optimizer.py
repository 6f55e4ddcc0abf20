"""What trains a network on labels: SGD, or LARS as SimCLRv2 fine-tunes (arXiv 2006.10029, section 3 and its code).

Under LARS, the trunk's kernels and matrices move by a share of their length. Biases, normalisation and the classifier
are left out of that and of weight decay: they are trained by SGD with the same momentum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from largescale.optim.lars import LARS, NORM_OF_SUM

SGD_NAME, LARS_NAME = "sgd", "lars"
PUBLISHED_LARS_RATES = [0.04, 0.04]
"""Of trunk and classifier per 256 images: the published 0.005 times the root of the batch, at 1,024 images."""

_MOMENTUM = 0.9


def build(name: str, groups: list[dict[str, Any]], *, weight_decay: float = 0.0, nesterov: bool = False) -> Optimizer:
    """An optimizer of parameter groups, each of which has its own rate; its learning rate is 0 until it is set.

    Args:
        name: `SGD_NAME` or `LARS_NAME`.
        groups: those with a true `is_trunk` are scaled by LARS.
        weight_decay: of all parameters, or of those that LARS scales.
        nesterov: whether SGD's momentum looks ahead; LARS has no such momentum.
    """
    if name == SGD_NAME:
        return torch.optim.SGD(groups, lr=0.0, momentum=_MOMENTUM, weight_decay=weight_decay, nesterov=nesterov)
    return LARS(
        [part for group in groups for part in _parts(group, weight_decay)],
        lr=0.0,
        momentum=_MOMENTUM,
        trust_denominator=NORM_OF_SUM,
    )


def _parts(group: dict[str, Any], weight_decay: float) -> list[dict[str, Any]]:
    """What LARS scales of a group, and the rest."""
    is_scaled = [bool(group.get("is_trunk")) and parameter.dim() > 1 for parameter in group["params"]]
    parts = []
    for scaled in (True, False):
        own = [one for one, of_scaled in zip(group["params"], is_scaled, strict=True) if of_scaled == scaled]
        decay = weight_decay if scaled else 0.0
        parts += [{**group, "params": own, "scaled": scaled, "weight_decay": decay}] if own else []
    return parts
