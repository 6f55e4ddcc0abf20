"""Which architecture tensors are of, by their names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from largescale.checkpoint import torchvision_layout
from largescale.config import ModelConfig
from largescale.models.backbones import available, build_backbone
from largescale.models.plain_networks import PLAIN_NETWORKS
from largescale.models.selective_kernel import SELECTIVE_KERNEL_RESNETS

Shapes = dict[str, tuple[int, ...]]
"""Of tensors by torchvision's names."""

COUNTER = "num_batches_tracked"
"""Ending of names of BatchNorm's counters: absent from files of before 2018, and of no effect here."""


@dataclass(frozen=True)
class Match:
    """How far tensors are those of an architecture.

    Attributes:
        model: the architecture.
        equal, total: tensors with equal names and shapes, and all that are in either.
    """

    model: ModelConfig
    equal: int
    total: int

    def words(self, asked: ModelConfig) -> str:
        """The same for people, with the settings that make the architecture of the one that was asked for."""
        settings = settings_of(self.model, asked)
        if self.equal == self.total:
            return f"all {self.total} tensors are those of {settings}"
        return f"the nearest known architecture is {settings}, with {self.equal} of {self.total} tensors equal"


def closest(family: str, there: Shapes) -> Match:
    """The architecture that has most tensors in common with those of a file.

    Args:
        family: `resnet`, `regnet` or `plain`.
        there: the tensors.
    """
    matches = []
    for model in _candidates(family, there):
        shapes = _shapes_of(model)
        keys = {key for key in shapes.keys() | there.keys() if key in there or not key.endswith(COUNTER)}
        matches.append(Match(model, sum(shapes.get(key) == there.get(key) for key in keys), len(keys)))
    return max(matches, key=lambda match: match.equal / match.total)


def settings_of(model: ModelConfig, asked: ModelConfig) -> str:
    """The settings that make an architecture of the one that was asked for, as on a command line.

    They are those that are not defaults, that were asked for otherwise, or that do not follow from a name.
    """
    others = (ModelConfig(), asked)
    keys = ["stem", "sobel", "norm"]
    keys = ["backbone", *(key for key in keys if any(vars(model)[key] != vars(other)[key] for other in others))]
    if model.backbone == "resnet":
        keys += ["depths", "width", "block"]
    return " ".join(f"model.{key}={str(vars(model)[key]).replace(' ', '')}" for key in keys)


def name_of(model: ModelConfig) -> str:
    """What messages call it: the backbone, and its normalisation if that is not BatchNorm."""
    return model.backbone if model.norm == "batch" else f"{model.backbone} with model.norm={model.norm}"


def _candidates(family: str, there: Shapes) -> list[ModelConfig]:
    """Architectures of a family; a ResNet of any depth and width is described by its own tensors."""
    if family == "plain":
        sobel = there.get("features.0.weight", (0, 3))[1:2] == (2,)
        return [ModelConfig(backbone=name, sobel=sobel) for name in PLAIN_NETWORKS]
    selective = any(".select." in key for key in there)
    published = (
        family == "regnet" or there.get("conv1.weight", (7,))[-1] == 7 or (selective and "stem.3.weight" in there)
    )
    stem = "imagenet" if published else "3x3s2"
    names = [name for name in available() if name != "resnet" and _family(name) == family]
    names = [name for name in names if (name in SELECTIVE_KERNEL_RESNETS) == selective]
    own = [_own_resnet(there, stem)] if family == "resnet" and "conv1.weight" in there else []
    return [*(ModelConfig(backbone=name, stem=stem) for name in names), *own]


def _family(backbone: str) -> str:
    return "plain" if backbone in PLAIN_NETWORKS else "regnet" if backbone.startswith("regnet") else "resnet"


def _own_resnet(there: Shapes, stem: str) -> ModelConfig:
    blocks = {tuple(key.split(".")[:2]) for key in there if key.startswith("layer")}
    depths = [sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 20)]
    block = "bottleneck" if "layer1.0.conv3.weight" in there else "basic"
    width = there["conv1.weight"][0]
    return ModelConfig("resnet", stem, [depth for depth in depths if depth], width, block)


def _shapes_of(model: ModelConfig) -> Shapes:
    return _shapes_of_named(model.backbone, model.stem, model.sobel) if model.backbone != "resnet" else _built(model)


@cache  # building all of them takes seconds, most of it in torch's Python
def _shapes_of_named(backbone: str, stem: str, sobel: bool) -> Shapes:
    return _built(ModelConfig(backbone=backbone, stem=stem, sobel=sobel))


def _built(model: ModelConfig) -> Shapes:
    with torch.device("meta"):
        backbone, _ = build_backbone(model)
    return {
        torchvision_layout.name_of(backbone, key): tuple(value.shape) for key, value in backbone.state_dict().items()
    }
