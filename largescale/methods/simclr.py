"""SimCLR: each view picks the other view of its image among all views of the batch (arXiv 2002.05709, section 2).

Loss for unit embeddings z of the 2 N views of a global batch, the naive loop::

    for i in views:
        others = [exp(z[i] @ z[n] / temperature) for n in views if n != i]
        loss += -log(exp(z[i] @ z[partner of i] / temperature) / sum(others))
    loss /= 2 * N

Views of other ranks are candidates like this rank's own, with their gradient. With more than two views (multi-crop:
SwAV, arXiv 2006.09882), each picks every other view of its image in turn, large or small, among that one and all views
of other images: the loss of VISSL, `losses/nt_xent.py`.

Version 2 (arXiv 2006.10029) has a head of three layers, `hidden: [2048, 2048]`, and is otherwise the same; without
the paper's memory of earlier batches, which adds about 1% there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from largescale.config import Config, require
from largescale.data.views import Views
from largescale.methods.contrastive import Contrastive, ContrastiveSettings, images_of_loss
from largescale.methods.embedding_method import SPANS, Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.over_ranks import all_ranks
from largescale.methods.losses.picks import among_views
from largescale.methods.method import Output
from largescale.methods.multi_crop import by_size
from largescale.models.backbones import build_backbone


@dataclass
class Settings(ContrastiveSettings):
    """SimCLR's keys under `method`."""

    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    def check(self, config: Config) -> None:
        """Other images are what a view is told apart from."""
        super().check(config)
        images = images_of_loss(config)
        require(images >= 2, "train.global_batch", config.train.global_batch, "two images or more that the loss spans")


class SimCLR(Contrastive):
    """Backbone, projection head, and the loss between all views. Nothing goes on from step to step.

    Evidence: `embeddings` [V, B, D].
    """

    title = "SimCLR"
    reference = "simclr/resnet50_100ep"
    head_name = "projection"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert isinstance(config.method, Settings)
        self.config = config.method
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = _head(self.num_features, self.config.hidden, self.config.embedding)
        self.signs = self.contrastive_signs(self.config.embedding)

    def embed(self, views: Views) -> Named:
        """`embeddings` [V, B, D], unit vectors."""
        z = self.projection(torch.cat([self.backbone(images) for images in by_size(views.images)]))
        return {"embeddings": unit(z).unflatten(0, (-1, len(views.ids)))}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss between all views of this rank and of the others.

        Collectives: those of `gather_rows`, once.
        """
        views = inputs["embeddings"]
        picks = among_views(views, self.config.temperature, all_ranks())
        views = views.detach()
        return Output(picks.loss(), self.watch(views[0], views[1], picks), {"embeddings": views})

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss if all embeddings were equal."""
        views = sum(group.num for group in config.data.crops)
        return {"all views alike": math.log(1 + views * (images_of_loss(config) - 1))}


def _head(num_features: int, hidden: list[int], embedding: int) -> nn.Sequential:
    """Linear layers without bias, each with BatchNorm, ReLU between; the last BatchNorm has a scale and no shift.

    Source: the published code of arXiv 2002.05709.
    """
    layers: list[nn.Module] = []
    widths = [num_features, *hidden, embedding]
    for place, (width, next_width) in enumerate(pairwise(widths), 1):
        layers += [nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width)]
        if place < len(widths) - 1:
            layers.append(nn.ReLU(inplace=True))
    layers[-1].bias.requires_grad_(False)
    return nn.Sequential(*layers)
