"""A backbone as layers on top of each other, each of which can be trained by itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from largescale.config import ModelConfig
from largescale.models.backbones import build_backbone, in_sequence
from largescale.models.evaluation_mode import running_statistics_used


class LayerShape(NamedTuple):
    """Of a layer: channels of the maps that it takes, and of those that it makes."""

    taken: int
    made: int


def layers_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """What a backbone that `build_backbone` made does before it pools: `stem`, `stage1`, ...; its own modules."""
    return {name: layer for name, layer in in_sequence(backbone).named_children() if not isinstance(layer, nn.Identity)}


def layer_shapes(config: ModelConfig, side: int) -> dict[str, LayerShape]:
    """Of each layer, for images with a side in px; found without weights."""
    with torch.device("meta"):
        backbone, _ = build_backbone(config)
        maps, found = torch.empty(1, 3, side, side), {}
        for name, layer in layers_of(backbone.eval()).items():
            made = layer(maps)
            found[name] = LayerShape(maps.shape[1], made.shape[1])
            maps = made
    return found


@torch.no_grad()
def input_of(backbone: nn.Module, name: str, images: Tensor) -> Tensor:
    """What the layers below make of images, by their running statistics, which stay as they are."""
    with running_statistics_used(backbone.modules()):
        for other, layer in layers_of(backbone).items():
            if other == name:
                return images
            images = layer(images)
    raise KeyError(name)


def patterns_of(network: nn.Module, layer: nn.Module) -> list[str]:
    """Patterns of the names of a layer's parameters in a network: of a sequence that is none of its modules, of what
    that is made of.
    """
    names = {id(module): name for name, module in network.named_modules()}
    parts = [layer] if id(layer) in names else list(layer.children())
    return [f"{names[id(part)]}.*" for part in parts]
