"""Strided 1x1 convolutions of few channels on a CPU.

oneDNN (torch 2.14) writes beyond its memory in the gradient of the weights of such a convolution, in float32, channels
last, with AVX-512 and fewer than 16 channels in: a crash, or worse. Picking the pixels that it looks at, and convolving
those without a stride, is the same and takes another way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SAFE_CHANNELS = 16


class NarrowConv2d(nn.Conv2d):
    """A strided 1x1 convolution without padding."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K, H', W'], channels last in memory."""
        if x.dtype != torch.float32:
            return super().forward(x)
        down, right = self.stride
        picked = x[:, :, ::down, ::right].contiguous(memory_format=torch.channels_last)
        return nn.functional.conv2d(picked, self.weight)


def pick_in_narrow(network: nn.Module) -> None:
    """Replace the convolutions of a network on a CPU that this is about, keeping their parameters."""
    for name, child in network.named_children():
        if type(child) is nn.Conv2d and _is_narrow(child):
            replacement = NarrowConv2d(
                child.in_channels, child.out_channels, 1, (child.stride[0], child.stride[1]), bias=False, device="meta"
            )
            replacement.weight = child.weight
            setattr(network, name, replacement)
        else:
            pick_in_narrow(child)


def _is_narrow(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.bias is None
        and conv.in_channels < _SAFE_CHANNELS
    )
