"""Convolutions of small maps on a CPU, as one matrix product of all images.

The last stages of a ResNet see maps of 2 to 3 pixels where crops are small. oneDNN spends two to nine times as long
on those convolutions as the matrix product that they are (`benchmarks/step.py` measures what a step gains); GPUs do
not. The result differs in rounding alone, whatever the batch.

MKL, which torch multiplies float32 matrices with, takes AVX-512 on Intel's CPUs alone. With half of its width, the
product is the slower way, so float32 is convolved on AMD's CPUs with AVX-512. That is a rule and not a measurement, so
that a run goes on as it began, the same on all ranks of a kind of CPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_MOST_POSITIONS = 9
_FEWEST_CHANNELS = 128
"""Positions of the output at most, and channels summed over at least, for the product to be the faster one."""
_CPUINFO = Path("/proc/cpuinfo")
_NOT_INTEL = ("AuthenticAMD", "HygonGenuine")


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 that multiplies matrices where its maps are small."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, K, H', W'], channels last in memory."""
        height, width = ((side - 1) // self.stride[0] + 1 for side in x.shape[2:])
        if height * width > _MOST_POSITIONS or torch.compiler.is_compiling():
            return super().forward(x)  # compiling the product takes minutes
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if x.dtype == torch.float32 and half_width_in_float32():
            return super().forward(x)
        product = _Product.apply(x, weight, self.stride[0])
        return product if bias is None else product + bias[:, None, None]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        # [K, C, 3, 3] to [K, 9 C], in the order of the windows: a copy, so that it is kept.
        matrix = weight.permute(0, 2, 3, 1).flatten(1)
        ctx.save_for_backward(x, matrix)
        ctx.stride = stride
        windows = _windows(x, stride)
        product = windows.flatten(0, 2).flatten(1) @ matrix.t()
        return product.view(*windows.shape[:3], -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and of the matrix."""
        x, matrix = ctx.saved_tensors
        windows = _windows(x, ctx.stride)
        rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
        grad_weight = (rows.t() @ windows.flatten(0, 2).flatten(1)).view(-1, 3, 3, x.shape[1]).permute(0, 3, 1, 2)
        grad_windows = (rows @ matrix).view(windows.shape)
        padded = grad.new_zeros(x.shape[0], x.shape[2] + 2, x.shape[3] + 2, x.shape[1])
        down, right = (ctx.stride * side for side in windows.shape[1:3])
        for i in range(3):
            for j in range(3):
                padded[:, i : i + down : ctx.stride, j : j + right : ctx.stride] += grad_windows[..., i, j, :]
        return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2), grad_weight, None


def _windows(x: Tensor, stride: int) -> Tensor:
    """The surroundings of every output position: [B, H', W', 3, 3, C]."""
    padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return padded.unfold(1, 3, stride).unfold(2, 3, stride).permute(0, 1, 2, 4, 5, 3)


@cache
def half_width_in_float32() -> bool:
    """Whether MKL multiplies float32 matrices here with vectors half as wide as the CPU's: AVX-512, but not Intel's."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    maker = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
    return maker in _NOT_INTEL


def multiply_small_maps(network: nn.Module) -> None:
    """Replace the convolutions of a network on a CPU that may see small maps, keeping their parameters."""
    for name, child in network.named_children():
        if type(child) is nn.Conv2d and _can_multiply(child):
            replacement = SmallMapConv2d(
                child.in_channels, child.out_channels, 3, child.stride[0], 1, bias=child.bias is not None, device="meta"
            )
            replacement.weight, replacement.bias = child.weight, child.bias
            setattr(network, name, replacement)
        else:
            multiply_small_maps(child)


def _can_multiply(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.stride[0] == conv.stride[1]
        and conv.in_channels >= _FEWEST_CHANNELS
    )
