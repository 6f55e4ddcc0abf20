"""Our backbones in timm's words: which of its networks each one is, and how that one names its tensors.

timm's ResNets have torchvision's names. Its RegNets have names of their own, and three of them exist twice, since timm
rounds widths otherwise than torchvision: those with torchvision's widths end in `_tv`.
"""

from __future__ import annotations

import re

from largescale.config import ModelConfig
from largescale.models.selective_kernel import SELECTIVE_KERNEL_RESNETS
from shards.ground.errors import InputError

NAMES = {
    **{
        name: name
        for name in (
            "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
            "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
        )
    },
    "regnet_x_400mf": "regnetx_004_tv",
    "regnet_x_800mf": "regnetx_008",
    "regnet_x_1_6gf": "regnetx_016",
    "regnet_x_3_2gf": "regnetx_032",
    "regnet_x_8gf": "regnetx_080",
    "regnet_x_16gf": "regnetx_160",
    "regnet_x_32gf": "regnetx_320",
    "regnet_y_400mf": "regnety_004",
    "regnet_y_800mf": "regnety_008_tv",
    "regnet_y_1_6gf": "regnety_016",
    "regnet_y_3_2gf": "regnety_032",
    "regnet_y_8gf": "regnety_080_tv",
    "regnet_y_16gf": "regnety_160",
    "regnet_y_32gf": "regnety_320",
    "regnet_y_64gf": "regnety_640",
    "regnet_y_128gf": "regnety_1280",
    "regnet_y_256gf": "regnety_2560",
}  # fmt: skip
"""timm's name of each backbone that it has."""

_OTHERS = {
    "resnet": "has no ResNet with these depths and widths",
    "vgg16_bn": "has none without fully connected layers",
}

_NOWHERE = "; use --format safetensors, onnx or torch_export"
"""For what torchvision does not have either."""

_REGNET = [
    (r"^stem\.0\.", "stem.conv."),
    (r"^stem\.1\.", "stem.bn."),
    *((rf"^trunk_output\.block\d\.block(\d)-{block}\.", rf"s\1.b{block + 1}.") for block in range(60)),
    *(
        (rf"^(s\d\.b\d+)\.{ours}\.{number}\.", rf"\1.{theirs}.{part}.")
        for ours, theirs in ((r"f\.a", "conv1"), (r"f\.b", "conv2"), (r"f\.c", "conv3"), ("proj", "downsample"))
        for number, part in enumerate(("conv", "bn"))
    ),
    (r"^(s\d\.b\d+)\.f\.se\.", r"\1.se."),
]


def network_of(config: ModelConfig) -> str:
    """timm's name of a backbone.

    Raises:
        InputError: timm has none like it; says which formats have a place for it.
    """
    elsewhere = "; use --format torchvision or safetensors"
    if config.sobel:
        raise InputError(f"model.sobel: timm has no Sobel filter before a network{_NOWHERE}")
    if config.norm != "batch":
        raise InputError(f"model.norm={config.norm}: timm's networks have BatchNorm{_NOWHERE}")
    if config.backbone not in NAMES:
        why = _OTHERS.get(config.backbone, "has no such network")
        if config.backbone == "alexnet_bn" or config.backbone in SELECTIVE_KERNEL_RESNETS:  # nor has torchvision
            elsewhere = _NOWHERE
        raise InputError(f"model.backbone={config.backbone}: timm {why}{elsewhere}")
    name = NAMES[config.backbone]
    stems = ("imagenet", "3x3s2") if name.startswith("regnet") else ("imagenet",)  # RegNet's own is 3x3 of stride 2
    if config.stem not in stems:
        raise InputError(f"model.stem={config.stem}: timm's {name} has no such stem{elsewhere}")
    if config.pool > 1:
        raise InputError(f"model.pool={config.pool}: timm's networks average their whole map{elsewhere}")
    return name


def name_of(name: str) -> str:
    """timm's name of a tensor that torchvision calls `name`."""
    if name.startswith(("stem.", "trunk_output.")):
        for pattern, replacement in _REGNET:
            name = re.sub(pattern, replacement, name)
    return name
