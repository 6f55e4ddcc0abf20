"""Layer normalisation in the place of BatchNorm, for tasks in which statistics of a batch would give answers away."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm
from torch.nn.modules.batchnorm import _BatchNorm


class ImageLayerNorm(nn.GroupNorm):
    """Mean 0 and variance 1 over the channels and places of each image, then a scale and a shift per channel.

    Computed in float32 at least, with scales in float32 if they are kept so, and given back in the type of its input:
    the same under autocast and where a strategy casts weights.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(1, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to maps of the same shape."""
        precision = torch.promote_types(x.dtype, torch.float32)
        found = group_norm(x.to(precision), 1, self.weight.to(precision), self.bias.to(precision), self.eps)
        return found.to(x.dtype)


def use_layer_norm(network: nn.Module) -> None:
    """Replace every BatchNorm of a network by `ImageLayerNorm`; names of scales and shifts stay."""
    for name, child in network.named_children():
        if isinstance(child, _BatchNorm):
            setattr(network, name, ImageLayerNorm(child.num_features, child.eps))
        else:
            use_layer_norm(child)
