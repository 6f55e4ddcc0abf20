"""Backbones by name: torchvision's ResNets and RegNets, SwAV's wide ones, SEER's RegNets, VGG-16 and AlexNet, ResNets
with selective kernels.

Sources: ResNet, arXiv 1512.03385; SwAV's wide ones, arXiv 2006.09882, table 1; RegNet, arXiv 2003.13678; SEER, arXiv
2103.01988, section 3, and for 10B arXiv 2202.08360, with the parameters of its public configurations. A backbone maps
images [B, 3, H, W] to pooled features [B, num_features]: the means of its last map, or of each cell of a grid laid over
it (`model.pool`), cell after cell. VGG-16 and AlexNet are in `plain_networks.py`, selective kernels in
`selective_kernel.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchvision.models.regnet import BlockParams, RegNet, ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from largescale.config import ModelConfig
from largescale.config.setting import a_name
from largescale.models.grid_mean import GridMean
from largescale.models.layer_norm import use_layer_norm
from largescale.models.plain_networks import PLAIN_NETWORKS, ConvBlock, PlainNetwork
from largescale.models.selective_kernel import SELECTIVE_KERNEL_RESNETS, SelectiveBottleneck, SelectiveKernelResNet
from largescale.models.sobel import see_edges
from shards.ground.errors import InputError

_RESIDUAL = (BasicBlock, Bottleneck, ResBottleneckBlock, SelectiveBottleneck)

BLOCKS = (*_RESIDUAL, ConvBlock)
"""The units that strategies shard and checkpointing recomputes: residual blocks; of plain networks, convolutions."""

_AS_SHORTCUT = "starts_as_shortcut"
"""Attribute of blocks whose branch is to add nothing at first."""

_FAMILIES = ("resnet", "wide_resnet", "resnext", "regnet_")


WIDE_RESNETS = {"resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}
"""SwAV's: a ResNet-50 with every layer this many times wider (torchvision's wide_resnet* only widen 3x3 layers)."""

REGNETS_Y = {
    "regnet_y_64gf": {"depth": 20, "w_0": 352, "w_a": 147.48, "w_m": 2.4, "group_width": 328},
    "regnet_y_256gf": {"depth": 27, "w_0": 640, "w_a": 230.83, "w_m": 2.53, "group_width": 373},
    "regnet_y_10b": {"depth": 27, "w_0": 1744, "w_a": 620.83, "w_m": 2.52, "group_width": 1010},
}
"""SEER's that torchvision does not have: number of blocks, and the line that their widths follow."""


class ResNet(nn.Module):
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
        self.width, self.num_features = width, channels
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to features [B, num_features]."""
        return self.pool(self.stages(self.stem(images))).flatten(1)


def build_backbone(config: ModelConfig) -> tuple[nn.Module, int]:
    """Build `model.backbone` with random weights, its classifier removed, its stem as `model.stem` and its last pool as
    `model.pool` says.

    Returns:
        The backbone, and the width of its features: channels of its maps, times cells.

    Raises:
        InputError: for an unknown name, and lists those there are; or for `model.zero_init_residual` of a network
            without residual blocks.
    """
    backbone, num_channels = _build(config)
    if config.pool > 1:
        setattr(backbone, _pool_name(backbone), GridMean(config.pool))
    if config.sobel:
        see_edges(backbone)
    if config.norm == "layer":
        use_layer_norm(backbone)
    if config.zero_init_residual:
        if isinstance(backbone, PlainNetwork):
            raise InputError(f"model.zero_init_residual: {config.backbone} has no residual blocks; leave it out")
        for block in filter(_is_residual, backbone.modules()):
            setattr(block, _AS_SHORTCUT, True)
            finish_block(block)
    return backbone, num_channels * config.pool**2


def _pool_name(backbone: nn.Module) -> str:
    return "pool" if hasattr(backbone, "pool") else "avgpool"


def _build(config: ModelConfig) -> tuple[nn.Module, int]:
    if config.backbone == "resnet":
        block = BasicBlock if config.block == "basic" else Bottleneck
        return _with_stem(ResNet(config.depths, config.width, block), config.stem)
    if config.backbone in PLAIN_NETWORKS:
        plain = PlainNetwork(config.backbone, config.stem)
        return plain, plain.num_features
    if config.backbone in SELECTIVE_KERNEL_RESNETS:
        selective = SelectiveKernelResNet(config.backbone, config.stem)
        return selective, selective.num_features
    if config.backbone in WIDE_RESNETS:
        return _with_stem(ResNet([3, 4, 6, 3], 64 * WIDE_RESNETS[config.backbone], Bottleneck), config.stem)
    names = available()
    if config.backbone not in names:
        raise InputError(f"model.backbone={config.backbone}: expected {a_name(config.backbone, names)}")
    with _widths_on_the_host():
        network = _regnet_y(config.backbone) or torchvision.models.get_model(config.backbone, weights=None)
    num_features = network.fc.in_features
    network.fc = nn.Identity()
    _STEMS["regnet" if config.backbone.startswith("regnet") else "resnet"](network, config.stem)
    return network, num_features


@torch.no_grad()
def finish_block(block: nn.Module) -> None:
    """Let a residual block start as its shortcut, if that is asked of it: the last scale of its branch is 0.

    Source: arXiv 1706.02677, section 5.1. Works on this rank's piece of the scale.
    """
    if getattr(block, _AS_SHORTCUT, False):
        scale = _last_norm(block).get_parameter("weight")
        (scale.to_local() if isinstance(scale, DTensor) else scale).zero_()


def _is_residual(module: nn.Module) -> bool:
    return isinstance(module, _RESIDUAL)


def _last_norm(block: nn.Module) -> nn.Module:
    """The normalisation at the end of a residual block's branch."""
    names = {BasicBlock: "bn2", Bottleneck: "bn3", ResBottleneckBlock: "f.c.1", SelectiveBottleneck: "bn3"}
    return block.get_submodule(next(name for kind, name in names.items() if isinstance(block, kind)))


def stages(backbone: nn.Module) -> list[nn.Sequential]:
    """The stages of a backbone that `build_backbone` made, each a sequence of blocks, with a pool among them or not."""
    if isinstance(backbone, ResNet | PlainNetwork | SelectiveKernelResNet):
        found = backbone.stages.children()
    elif isinstance(backbone, RegNet):
        found = backbone.trunk_output.children()
    else:
        found = (backbone.get_submodule(f"layer{number}") for number in (1, 2, 3, 4))
    return [cast(nn.Sequential, stage) for stage in found]


def in_sequence(backbone: nn.Module) -> nn.Sequential:
    """What a backbone that `build_backbone` made does before it pools, by name: `stem`, `stage1`, `stage2`, ...

    The modules are the backbone's own, so that training them trains it. The last max pool of plain
    networks counts as pooling.
    """
    if isinstance(backbone, ResNet | RegNet | SelectiveKernelResNet):
        stem: nn.Module = backbone.stem
    elif isinstance(backbone, PlainNetwork):
        stem = nn.Identity()
    else:
        stem = nn.Sequential(*(backbone.get_submodule(name) for name in ("conv1", "bn1", "relu", "maxpool")))
    named = {f"stage{number}": stage for number, stage in enumerate(stages(backbone), 1)}
    return nn.Sequential(OrderedDict[str, nn.Module](stem=stem, **named))


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """What a backbone that `build_backbone` made pools: images [B, 3, H, W] to maps [B, C, h, w], of `map_channels`."""
    if isinstance(backbone, ResNet | SelectiveKernelResNet):
        return backbone.stages(backbone.stem(images))
    if isinstance(backbone, RegNet):
        return backbone.trunk_output(backbone.stem(images))
    if isinstance(backbone, PlainNetwork):
        return backbone.maps(images)
    theirs = cast(torchvision.models.ResNet, backbone)
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
    for stage in stages(backbone):
        x = stage(x)
    return x


def map_channels(config: ModelConfig, num_features: int) -> int:
    """Channels of the maps of `feature_map`, of the backbone whose features have this width."""
    return num_features // config.pool**2


def map_side(config: ModelConfig, side: int) -> int:
    """Side of the maps of `feature_map`, of images with a side in px; found without weights."""
    with torch.device("meta"):
        backbone, _ = build_backbone(config)
        return feature_map(backbone.eval(), torch.empty(1, 3, side, side)).shape[-1]


def require_cells(config: ModelConfig, sides: Mapping[str, int]) -> None:
    """Refuse a grid with more cells than the maps of images have places.

    Args:
        config: of the backbone.
        sides: of images that it sees, in px, by the keys of the configuration that say so.

    Raises:
        InputError: there are fewer; says how many.
    """
    key = min(sides, key=lambda name: sides[name])
    if config.pool > 1 and (places := map_side(config, sides[key])) < config.pool:
        raise InputError(
            f"model.pool={config.pool}: {key}={sides[key]} makes maps of {places} x {places} places, fewer than cells; "
            f"lower the former, or raise the latter"
        )


def pooled(backbone: nn.Module, maps: Tensor) -> Tensor:
    """Maps of `feature_map` to what the backbone itself returns."""
    return backbone.get_submodule(_pool_name(backbone))(maps).flatten(1)


def chosen_blocks(backbone: nn.Module, numbers: list[int], *, key: str) -> list[nn.Module]:
    """The blocks of some stages, counted from 1.

    Raises:
        InputError: a stage that the backbone does not have; names the key of the configuration.
    """
    available_stages = stages(backbone) if numbers else []
    if any(not 1 <= number <= len(available_stages) for number in numbers):
        raise InputError(f"{key}={numbers}: expected stages from 1 to {len(available_stages)} of this backbone")
    return [block for number in numbers for block in available_stages[number - 1] if isinstance(block, BLOCKS)]


def available() -> list[str]:
    """Names that `model.backbone` may have."""
    theirs = [name for name in torchvision.models.list_models(torchvision.models) if name.startswith(_FAMILIES)]
    return ["resnet", *WIDE_RESNETS, *theirs, *REGNETS_Y, *PLAIN_NETWORKS, *SELECTIVE_KERNEL_RESNETS]


@contextmanager
def _widths_on_the_host() -> Iterator[None]:
    """Keep torchvision's width arithmetic off the meta device: it uses tensors, which cannot be read there."""
    theirs = BlockParams.__dict__["from_init_params"]

    def on_the_host(cls: type[BlockParams], *arguments: Any, **options: Any) -> BlockParams:
        with torch.device("cpu"):
            return theirs.__func__(cls, *arguments, **options)

    BlockParams.from_init_params = classmethod(on_the_host)
    try:
        yield
    finally:
        BlockParams.from_init_params = theirs


def _regnet_y(name: str) -> RegNet | None:
    if name not in REGNETS_Y:
        return None
    widths = BlockParams.from_init_params(**REGNETS_Y[name], se_ratio=0.25)
    return RegNet(widths, norm_layer=partial(nn.BatchNorm2d, eps=1e-5, momentum=0.1))


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


def _with_stem(network: ResNet, stem: str) -> tuple[ResNet, int]:
    if stem != "imagenet":
        network.stem[0] = _conv3x3(network.width, 2 if stem == "3x3s2" else 1)
        network.stem[3] = nn.Identity()
    return network, network.num_features


def _resnet_stem(network: torchvision.models.ResNet, stem: str) -> None:
    if stem != "imagenet":
        network.conv1 = _conv3x3(network.conv1.out_channels, 2 if stem == "3x3s2" else 1)
        network.maxpool = nn.Identity()


def _regnet_stem(network: RegNet, stem: str) -> None:
    # RegNet's published stem is the 3x3 convolution of stride 2 already.
    if stem == "3x3":
        network.stem[0] = _conv3x3(network.stem[0].out_channels, 1)


_STEMS: dict[str, Callable[[Any, str], None]] = {"resnet": _resnet_stem, "regnet": _regnet_stem}


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, whole ones where they are sharded."""
    return sum(parameter.numel() for parameter in module.parameters())
