"""What stands on the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from largescale.config.setting import setting


def hidden_widths(default: Sequence[int] = (2048,)) -> Any:
    """The setting of methods that have a projection head: a field of a dataclass."""
    return setting(
        list(default),
        "Hidden widths of the projection head.",
        at_least=1,
        at_most=2**24,
        expected="widths of at least 1 and at most 16777216",
    )


def projection_head(num_features: int, hidden: list[int], embedding: int, *, batchnorm: bool) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between: [B, num_features] to [B, embedding]."""
    layers: list[nn.Module] = []
    width = num_features
    for next_width in hidden:
        layers.append(nn.Linear(width, next_width, bias=not batchnorm))
        if batchnorm:
            layers.append(nn.BatchNorm1d(next_width))
        layers.append(nn.ReLU(inplace=True))
        width = next_width
    layers.append(nn.Linear(width, embedding))
    return nn.Sequential(*layers)
