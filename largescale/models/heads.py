"""What stands on the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from largescale.config.setting import setting


def hidden_widths(default: Sequence[int] = (2048,), of: str = "the projection head", **declared: Any) -> Any:
    """The setting of methods that have a head: a field of a dataclass."""
    return setting(
        list(default),
        f"Hidden widths of {of}.",
        at_least=1,
        at_most=2**24,
        expected="widths of at least 1 and at most 16777216",
        **declared,
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


class HeadConv2d(nn.Conv2d):
    """A convolution whose weights start as a linear layer's, which are torch's own, not as a backbone's convolutions;
    see `models.initialise`.
    """


class CellLinear(HeadConv2d):
    """A linear layer for each cell of a map, [B, C, h, w] to [B, D, h, w]."""

    def __init__(self, width: int, next_width: int) -> None:
        super().__init__(width, next_width, 1)


Norm = Literal["none", "affine", "plain"]
"""BatchNorm after a layer: none, with scale and shift, or without."""


def mlp(
    widths: Sequence[int], *, bias: bool, last_bias: bool, norm: Norm = "affine", last_norm: Norm = "none"
) -> nn.Sequential:
    """Linear layers, each but the last followed by BatchNorm and ReLU.

    Args:
        widths: of the input, of the hidden layers and of the output.
        bias: of the layers but the last.
        last_bias: of the last one.
        norm: after the layers but the last.
        last_norm: after the last one, without ReLU.
    """
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths[:-1]):
        layers += [nn.Linear(width, next_width, bias=bias), *_batchnorm(next_width, norm), nn.ReLU(inplace=True)]
    layers += [nn.Linear(widths[-2], widths[-1], bias=last_bias), *_batchnorm(widths[-1], last_norm)]
    return nn.Sequential(*layers)


def _batchnorm(width: int, norm: Norm) -> list[nn.Module]:
    if norm == "none":
        return []
    # Without scale and shift: both stay at 1 and 0, so that every strategy and SyncBatchNorm see the same module.
    return [nn.BatchNorm1d(width).requires_grad_(norm == "affine")]
