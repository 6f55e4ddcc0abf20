"""VGG-16 and AlexNet with BatchNorm: convolutions in sequence, without shortcuts.

Sources: VGG, arXiv 1409.1556, as torchvision's `vgg16_bn`; AlexNet as DeepCluster trains it (arXiv 1807.05520, section
4): BatchNorm after every convolution, no local response normalisation, no groups. Its layers, as channels (kernel,
stride): 96 (11, 4), pool, 256 (5), pool, 384 (3), 384 (3), 256 (3), pool; pools are 3x3 of stride 2.

Only the convolutions are here: features are the means of the last maps, after the last pool (512 and 256 numbers). The
fully connected layers that the papers put behind them are a head's matter.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor, nn

from shards.ground.errors import InputError

Layer = tuple[int, int, int, int]
"""Channels, kernel, stride and padding of a convolution."""


@dataclass(frozen=True)
class Plan:
    """Layers of a network.

    Attributes:
        stages: convolutions; a pool comes before a stage in `pooled`, and after the last one.
        pooled: numbers of stages, from 1.
        pool: side of the pools, which have stride 2.
        least_side: of images in px, with the published stem.
    """

    stages: list[list[Layer]]
    pooled: set[int]
    pool: int
    least_side: int


def _threes(*channels: int) -> list[Layer]:
    return [(number, 3, 1, 1) for number in channels]


PLAIN_NETWORKS = {
    "vgg16_bn": Plan(
        [_threes(64, 64), _threes(128, 128), *([_threes(*[width] * 3) for width in (256, 512, 512)])],
        {2, 3, 4, 5},
        2,
        32,
    ),
    "alexnet_bn": Plan(
        [[(96, 11, 4, 2)], [(256, 5, 1, 2)], _threes(384), _threes(384), _threes(256)], {2, 3}, 3, 63
    ),
}  # fmt: skip


def least_side(name: str, stem: str) -> int:
    """Of images in px that a network can see; 1 for networks that are not plain."""
    if name not in PLAIN_NETWORKS:
        return 1
    plan = PLAIN_NETWORKS[name]
    if stem == "imagenet":
        return plan.least_side
    # A pool of 2 px rounds up to a map of 1 px; those of 3 px need 2, twice.
    return 1 if plan.pool == 2 else {"3x3": 4, "3x3s2": 7}[stem]


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm and ReLU, named by their places in torchvision's `features`."""

    def __init__(self, channels: int, layer: Layer, place: int) -> None:
        width, kernel, stride, padding = layer
        conv = nn.Conv2d(channels, width, kernel, stride, padding)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(conv.get_parameter("bias"))
        parts = (conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        super().__init__(OrderedDict[str, nn.Module]((str(place + n), part) for n, part in enumerate(parts)))


class PlainNetwork(nn.Module):
    """Stages of convolution blocks, each stage behind a pool as its plan says.

    Args:
        name: in `PLAIN_NETWORKS`.
        stem: `imagenet` as published; `3x3s2` or `3x3` make the first convolution a 3x3 of stride 2 or 1 and leave the
            first pool out, and the other pools round sides up, so that images of 28 px keep maps to the end.
    """

    def __init__(self, name: str, stem: str) -> None:
        super().__init__()
        plan, small = PLAIN_NETWORKS[name], stem != "imagenet"
        self.name, self.stem, self.least_side = name, stem, least_side(name, stem)
        channels, place, stages = 3, 0, []
        for number, layers in enumerate(plan.stages, 1):
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            if number in plan.pooled:
                place += 1
                if not (small and number == min(plan.pooled)):
                    stage["pool"] = nn.MaxPool2d(plan.pool, 2, ceil_mode=small)
            for layer in layers:
                if small and place == 0:
                    layer = (layer[0], 3, 2 if stem == "3x3s2" else 1, 1)
                stage[f"block{place}"] = ConvBlock(channels, layer, place)
                channels, place = layer[0], place + 3
            stages.append(nn.Sequential(stage))
        self.stages = nn.Sequential(*stages)
        self.last_pool = nn.MaxPool2d(plan.pool, 2, ceil_mode=small)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels

    def maps(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to maps [B, num_features, h, w].

        Raises:
            InputError: the images are too small for the stem.
        """
        if min(images.shape[2:]) < self.least_side:
            raise InputError(
                f"model.backbone={self.name}: images of {images.shape[2]}x{images.shape[3]} px, but with "
                f"model.stem={self.stem} it needs {self.least_side}; use "
                f"{'model.stem=3x3s2 or 3x3, or ' if self.stem == 'imagenet' else ''}larger crops"
            )
        return self.last_pool(self.stages(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, num_features]."""
        return self.pool(self.maps(images)).flatten(1)
