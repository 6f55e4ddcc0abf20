"""Our backbones in the words of torchvision: names of tensors, and the lines that build the network in plain torch.

torchvision's own networks keep their names. Ours (`model.backbone=resnet` and SwAV's wide ones) are torchvision's
blocks in another frame; its `ResNet`, given other stages, holds them. So does its `vgg16_bn`, without its fully
connected layers; it has no AlexNet with BatchNorm, and no Sobel filter.
"""

from __future__ import annotations

import re

from torch import nn

from largescale.config import ModelConfig
from largescale.models.backbones import REGNETS_Y, WIDE_RESNETS, ResNet
from largescale.models.plain_networks import PlainNetwork
from largescale.models.selective_kernel import SELECTIVE_KERNEL_RESNETS, SelectiveKernelResNet
from shards.ground.errors import InputError

_MOST_STAGES = 4
_ELSEWHERE = "use --format safetensors, onnx or torch_export"
_LAYERS = (nn.Linear, nn.BatchNorm1d, nn.ReLU)
_STRIDES = {"3x3s2": 2, "3x3": 1}
_FRAME = {"stem.0.": "conv1.", "stem.1.": "bn1."}


def check(config: ModelConfig) -> None:
    """Refuse what torchvision has no place for.

    Raises:
        InputError: more than four stages, or another network that it does not have.
    """
    if config.sobel:
        raise InputError(f"model.sobel: torchvision has no Sobel filter before a network; {_ELSEWHERE}")
    if config.norm != "batch":
        raise InputError(f"model.norm={config.norm}: torchvision's networks have BatchNorm; {_ELSEWHERE}")
    if config.backbone in SELECTIVE_KERNEL_RESNETS:
        raise InputError(f"model.backbone={config.backbone}: torchvision has no selective kernels; {_ELSEWHERE}")
    if config.backbone == "alexnet_bn":
        raise InputError(f"model.backbone=alexnet_bn: torchvision has no AlexNet with BatchNorm; {_ELSEWHERE}")
    if config.backbone == "resnet" and len(config.depths) > _MOST_STAGES:
        raise InputError(
            f"model.depths={config.depths}: torchvision's ResNet has {_MOST_STAGES} stages, this backbone "
            f"has {len(config.depths)}; it cannot be exported with torchvision's names"
        )


def name_of(backbone: nn.Module, name: str) -> str:
    """torchvision's name of a tensor of our backbone."""
    if isinstance(backbone, PlainNetwork):
        return re.sub(r"^stages\.\d+\.block\d+\.", "features.", name)
    if not isinstance(backbone, ResNet | SelectiveKernelResNet):
        return name
    for ours, theirs in _FRAME.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return re.sub(r"^stages\.(\d+)\.", lambda found: f"layer{int(found[1]) + 1}.", name)


def head_name(config: ModelConfig) -> str:
    """What the network calls the place of its head."""
    return "classifier" if config.backbone == "vgg16_bn" else "fc"


def stem_width(backbone: nn.Module) -> int:
    """Channels of a backbone's first convolution."""
    return next(module for module in backbone.modules() if isinstance(module, nn.Conv2d)).out_channels


def build_lines(config: ModelConfig, stem_width: int, head: nn.Module | None = None) -> str:
    """Python that makes the network as `model`, with random weights, and the head, or nothing, as its classifier.

    Args:
        config: of the backbone.
        stem_width: channels of its first convolution.
        head: what turns its features into embeddings.

    Raises:
        InputError: the head is not a sequence of layers that torch has.
    """
    lines = _backbone_lines(config, stem_width)
    if config.pool > 1:
        lines += f"model.avgpool = torch.nn.AdaptiveAvgPool2d({config.pool})\n"
    return f"{lines}model.{head_name(config)} = {_head(head)}\n"


def _head(head: nn.Module | None) -> str:
    if head is None:
        return "torch.nn.Identity()"
    layers = list(head) if isinstance(head, nn.Sequential) else [head]
    if not all(type(layer) in _LAYERS for layer in layers):
        raise InputError("--head: it has layers that torchvision's names have no place for; use --format safetensors")
    return f"torch.nn.Sequential({', '.join(f'torch.nn.{layer!r}' for layer in layers)})"


def _backbone_lines(config: ModelConfig, stem_width: int) -> str:
    if config.backbone == "resnet":
        return _resnet(config.depths, config.width, config.block, config.stem)
    if config.backbone in WIDE_RESNETS:
        return _resnet([3, 4, 6, 3], 64 * WIDE_RESNETS[config.backbone], "bottleneck", config.stem)
    stride = _STRIDES.get(config.stem, 0)
    if config.backbone.startswith("regnet"):
        lines = _regnet(config.backbone)
        if stride == 1:  # theirs is a 3x3 convolution of stride 2 already
            lines += [f"model.stem[0] = torch.nn.Conv2d(3, {stem_width}, 3, 1, 1, bias=False)"]
        return _code(lines)
    lines = ["import torch, torchvision", f"model = torchvision.models.{config.backbone}()"]
    if config.backbone == "vgg16_bn":
        return _code([*lines, "model.avgpool = torch.nn.AdaptiveAvgPool2d(1)", *(_small_vgg(stride) if stride else [])])
    return _code([*lines, *(_small_stem(stem_width, stride) if stride else [])])


def _regnet(name: str) -> list[str]:
    if name not in REGNETS_Y:
        return ["import torch, torchvision", f"model = torchvision.models.{name}()"]
    widths = ", ".join(f"{key}={value}" for key, value in REGNETS_Y[name].items())
    return [
        "import torch",
        "from functools import partial",
        "from torchvision.models.regnet import BlockParams, RegNet",
        f"params = BlockParams.from_init_params({widths}, se_ratio=0.25)",
        "model = RegNet(params, norm_layer=partial(torch.nn.BatchNorm2d, eps=1e-5, momentum=0.1))",
    ]


def _resnet(depths: list[int], width: int, block: str, stem: str) -> str:
    name = "BasicBlock" if block == "basic" else "Bottleneck"
    lines = [
        "import torch",
        f"from torchvision.models.resnet import {name}, ResNet",
        f"model = ResNet({name}, [1, 1, 1, 1])",
    ]
    if stem == "imagenet":
        lines += [f"model.conv1 = torch.nn.Conv2d(3, {width}, 7, 2, 3, bias=False)"]
    else:
        lines += _small_stem(width, _STRIDES[stem])
    lines += [f"model.bn1 = torch.nn.BatchNorm2d({width})", f"model.inplanes = {width}"]
    for stage in range(_MOST_STAGES):
        made = "torch.nn.Identity()"
        if stage < len(depths):
            made = f"model._make_layer({name}, {width * 2**stage}, {depths[stage]}, stride={1 if stage == 0 else 2})"
        lines += [f"model.layer{stage + 1} = {made}"]
    return _code(lines)


def _small_stem(width: int, stride: int) -> list[str]:
    return [
        f"model.conv1 = torch.nn.Conv2d(3, {width}, 3, {stride}, 1, bias=False)",
        "model.maxpool = torch.nn.Identity()",
    ]


def _small_vgg(stride: int) -> list[str]:
    return [
        f"model.features[0].stride = ({stride}, {stride})",
        "model.features[6] = torch.nn.Identity()",
        "for number in (13, 23, 33, 43): model.features[number].ceil_mode = True",
    ]


def _code(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
