"""ResNets with selective kernels, as SimCLRv2 has them (arXiv 2006.10029): ResNet-D's stem and shortcuts, and blocks
that weigh two streams of a convolution by what is in the image (arXiv 1903.06586).

    x = relu(bn(conv3x3(x)))                 # 2 C channels: two streams of C
    m = conv1x1(relu(bn(conv1x1(mean over places of the streams' sum))))
    x = sum over streams of softmax(m) * x   # C channels

Both streams are 3x3, in one convolution; ports with kernels of 3 and 5 are other networks. Sides of maps and windows of
pools are those of the published code for images whose sides are multiples of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
SELECTIVE_KERNEL_RESNETS = {
    f"resnet{depth}{'' if width == 1 else f'w{width}'}_sk": (depth, width) for depth in DEPTHS for width in (1, 2, 3)
}
"""Depth, and times the width of a ResNet, by name."""

_EXPANSION = 4
_FEWEST = 32
_REDUCTION = 16
"""Channels of the layer that weighs streams: those of a stream over 16, but 32 at least."""


class SelectiveKernel(nn.Module):
    """A 3x3 convolution of two streams, and their sum weighted by channel and image: [B, I, H, W] to [B, C, h, w]."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        between = max(width // _REDUCTION, _FEWEST)
        self.conv = nn.Conv2d(channels, 2 * width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.squeeze = nn.Conv2d(width, between, 1, bias=False)
        self.squeeze_bn = nn.BatchNorm2d(between)
        self.expand = nn.Conv2d(between, 2 * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the weighted streams."""
        first, second = self.relu(self.bn(self.conv(x))).chunk(2, 1)
        means = (first + second).mean((2, 3), keepdim=True)
        asked = self.expand(self.relu(self.squeeze_bn(self.squeeze(means))))
        weights = torch.stack(asked.chunk(2, 1)).softmax(0).to(first.dtype)
        return first * weights[0] + second * weights[1]


class SelectiveBottleneck(nn.Module):
    """A residual block, 1x1, selective kernel and 1x1: [B, channels, H, W] to [B, 4 planes, h, w]."""

    def __init__(self, channels: int, planes: int, stride: int, *, shortcut: bool) -> None:
        super().__init__()
        out = _EXPANSION * planes
        self.downsample = _Shortcut(channels, out, stride) if shortcut else None
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.select = SelectiveKernel(planes, planes, stride)
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The branch, added to the shortcut."""
        branch = self.select(self.relu(self.bn1(self.conv1(x))))
        branch = self.bn3(self.conv3(branch))
        return self.relu(branch + (x if self.downsample is None else self.downsample(x)))


class _Shortcut(nn.Sequential):
    """ResNet-D's: means of 2x2 places in the place of a stride (arXiv 1812.01187, section 4.2)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else _MeanOfFour()
        super().__init__(pool, nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))


class _MeanOfFour(nn.Module):
    """Means of 2x2 places at every place; at the far edges, of those that there are."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return nn.functional.avg_pool2d(pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)


class SelectiveKernelResNet(nn.Module):
    """Stages of selective-kernel blocks, channels doubling from stage to stage.

    Args:
        name: in `SELECTIVE_KERNEL_RESNETS`.
        stem: `imagenet` as published: three 3x3 convolutions, the first of stride 2, and a pool; `3x3s2` or `3x3`: one
            3x3 convolution (stride 2 or 1), no pool.
    """

    def __init__(self, name: str, stem: str) -> None:
        super().__init__()
        depth, times = SELECTIVE_KERNEL_RESNETS[name]
        self.name, width = name, 64 * times
        self.stem = _stem(width, stem)
        stages, channels = [], width
        for number, blocks in enumerate(DEPTHS[depth]):
            planes = width * 2**number
            made = []
            for place in range(blocks):
                stride = 2 if number and not place else 1
                made.append(SelectiveBottleneck(channels, planes, stride, shortcut=place == 0))
                channels = _EXPANSION * planes
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, num_features]."""
        return self.pool(self.stages(self.stem(images))).flatten(1)


def _stem(width: int, stem: str) -> nn.Sequential:
    if stem != "imagenet":
        return nn.Sequential(*_convolution(3, width, 2 if stem == "3x3s2" else 1))
    first, second, third = (
        _convolution(3, width // 2, 2),
        _convolution(width // 2, width // 2),
        _convolution(width // 2, width),
    )
    return nn.Sequential(*first, *second, *third, nn.MaxPool2d(3, 2, ceil_mode=True))


def _convolution(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
