"""Backbones by name: torchvision's ResNets and RegNets, and small ResNets built from torchvision's blocks.

Sources: ResNet, arXiv 1512.03385; RegNet, arXiv 2003.13678. A backbone maps images [B, 3, H, W] to pooled features
[B, num_features].
"""

from __future__ import annotations

from collections.abc import Callable

import torchvision
from torch import Tensor, nn
from torchvision.models.regnet import RegNet, ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from largescale.config import ModelConfig
from shards.errors import InputError

BLOCKS = (BasicBlock, Bottleneck, ResBottleneckBlock)
"""Residual blocks: the units that strategies shard and checkpointing recomputes."""

_FAMILIES = ("resnet", "wide_resnet", "resnext", "regnet_")


class SmallResNet(nn.Module):
    """A ResNet of any depth and width: stages of torchvision's blocks, channels doubling from stage to stage."""

    def __init__(self, depths: list[int], width: int, block: type[BasicBlock] | type[Bottleneck]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        stages, channels = [], width
        for number, depth in enumerate(depths):
            stride = 1 if number == 0 else 2
            planes = width * 2**number
            blocks = [_block(block, channels, planes, stride)]
            channels = planes * block.expansion
            blocks += [_block(block, channels, planes, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, num_features]."""
        return self.pool(self.stages(self.stem(images))).flatten(1)


def build_backbone(config: ModelConfig) -> tuple[nn.Module, int]:
    """Build `model.backbone` with random weights, its classifier removed and its stem as `model.stem` says.

    Returns:
        The backbone, and the width of its features.

    Raises:
        InputError: for a name that torchvision does not have; it lists those it has.
    """
    if config.backbone == "resnet":
        block = BasicBlock if config.block == "basic" else Bottleneck
        network = SmallResNet(config.depths, config.width, block)
        _small_resnet_stem(network, config.stem)
        return network, network.num_features
    names = available()
    if config.backbone not in names:
        raise InputError(f"model.backbone={config.backbone}: expected one of {', '.join(names)}")
    network = torchvision.models.get_model(config.backbone, weights=None)
    num_features = network.fc.in_features
    network.fc = nn.Identity()
    _STEMS["regnet" if config.backbone.startswith("regnet") else "resnet"](network, config.stem)
    return network, num_features


def stages(backbone: nn.Module) -> list[nn.Sequential]:
    """The stages of a backbone that `build_backbone` made, each a sequence of residual blocks."""
    if isinstance(backbone, SmallResNet):
        return list(backbone.stages)
    if isinstance(backbone, RegNet):
        return list(backbone.trunk_output)
    return [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]


def chosen_blocks(backbone: nn.Module, numbers: list[int], *, key: str) -> list[nn.Module]:
    """The residual blocks of some stages, counted from 1.

    Raises:
        InputError: a stage that the backbone does not have; names the key of the configuration.
    """
    available_stages = stages(backbone) if numbers else []
    if any(not 1 <= number <= len(available_stages) for number in numbers):
        raise InputError(f"{key}={numbers}: expected stages from 1 to {len(available_stages)} of this backbone")
    return [block for number in numbers for block in available_stages[number - 1]]


def available() -> list[str]:
    """Names that `model.backbone` may have."""
    return ["resnet", *(name for name in torchvision.models.list_models(torchvision.models)
                        if name.startswith(_FAMILIES))]


def _block(block: type[BasicBlock] | type[Bottleneck], channels: int, planes: int, stride: int) -> nn.Module:
    out = planes * block.expansion
    shortcut = None
    if stride != 1 or channels != out:
        shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))
    return block(channels, planes, stride, shortcut)


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv3x3(width: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(3, width, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _small_resnet_stem(network: SmallResNet, stem: str) -> None:
    if stem != "imagenet":
        network.stem[0] = _conv3x3(network.stem[0].out_channels, 2 if stem == "3x3s2" else 1)
        network.stem[3] = nn.Identity()


def _resnet_stem(network: nn.Module, stem: str) -> None:
    if stem != "imagenet":
        network.conv1 = _conv3x3(network.conv1.out_channels, 2 if stem == "3x3s2" else 1)
        network.maxpool = nn.Identity()


def _regnet_stem(network: nn.Module, stem: str) -> None:
    # RegNet's published stem is the 3x3 convolution of stride 2 already.
    if stem == "3x3":
        network.stem[0] = _conv3x3(network.stem[0].out_channels, 1)


_STEMS: dict[str, Callable[[nn.Module, str], None]] = {"resnet": _resnet_stem, "regnet": _regnet_stem}


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, whole ones where they are sharded."""
    return sum(parameter.numel() for parameter in module.parameters())
