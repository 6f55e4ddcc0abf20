"""What is measured of a network: a checkpoint of a run, or a file of weights that others published."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from largescale.checkpoint.folder import Checkpoint
from largescale.checkpoint.foreign import ForeignBackbone
from largescale.config import Config, MethodConfig
from largescale.evaluate.extract import load_method
from largescale.methods import Method, method_class
from largescale.methods.method import Exemplars
from largescale.methods.pictures import Pictures
from largescale.models.backbones import build_backbone


@dataclass(frozen=True)
class Published:
    """A backbone from a file of weights, in place of a checkpoint.

    Attributes:
        found: what was read.
        told_stem: the stem, where the user told it, since tensors do not.
    """

    found: ForeignBackbone
    told_stem: str = ""

    step: ClassVar[None] = None
    """Files do not tell."""

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.found.path

    @property
    def content_hash(self) -> str:
        """Identifies the file by its content, and what is made of it."""
        return f"sha256:{self.found.sha256}" + (f" model.stem={self.told_stem}" if self.told_stem else "")


Weights = Checkpoint | Published


class BackboneAlone(Method):
    """A backbone without what trained it."""

    title = "backbone"
    Settings = MethodConfig

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.backbone, self.num_features, self.signs = backbone, num_features, {}


class BackboneWithHead(BackboneAlone):
    """A backbone and its projection head, without what trained them."""

    title = "backbone with a head"
    head_name = "projection"

    def __init__(self, backbone: nn.Module, num_features: int, projection: nn.Sequential) -> None:
        super().__init__(backbone, num_features)
        self.projection = projection


def method_of(config: Config, weights: Weights, *, trained: bool = True) -> Method:
    """The method in evaluation mode with these weights, or as its training began: drawn by `run.seed`.

    Raises:
        InputError: the weights do not fit the configuration.
    """
    if isinstance(weights, Checkpoint):
        return load_method(config, weights if trained else None)
    torch.manual_seed(config.run.seed)
    built = build_backbone(config.model)
    head = deepcopy(weights.found.projection)
    method = BackboneAlone(*built) if head is None else BackboneWithHead(*built, head)
    if trained:
        method.backbone.load_state_dict(weights.found.backbone.state_dict(), strict=True)
    else:
        for layer in head or ():
            if isinstance(layer, nn.Linear | nn.BatchNorm1d):
                layer.reset_parameters()
    return method.eval()


def exemplars_of(config: Config, weights: Weights) -> Exemplars | None:
    """What the method assigns images to; None if it assigns none, or its heads are not in the file."""
    return method_class(config).exemplars if isinstance(weights, Checkpoint) else None


def pictures_of(config: Config, weights: Weights) -> Pictures | None:
    """What the method draws; None if it draws nothing, or its heads are not in the file."""
    return method_class(config).pictures if isinstance(weights, Checkpoint) else None


def what_is_measured(config: Config, weights: Weights) -> str:
    """In a few words, for messages: nothing is known of what trained a file of weights."""
    if isinstance(weights, Published):
        return f"{weights.path.name}, a file of weights,"
    return f"a {method_class(config).title} run"
