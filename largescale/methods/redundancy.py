"""Shared by methods that pull two views of an image together, and keep the dimensions of a batch's embeddings apart.

Views pass one by one, so BatchNorm's statistics are those of one view, as in the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from largescale.config import Config, MethodConfig, require
from largescale.config.setting import setting
from largescale.data.views import Views
from largescale.methods.embedding_method import SPANS, Named
from largescale.methods.joint_embedding import JointEmbedding, unit
from largescale.methods.method import Output, Sign
from largescale.methods.multi_crop import each_view, require_two_views
from largescale.models.backbones import build_backbone
from largescale.models.heads import hidden_widths


@dataclass
class RedundancySettings(MethodConfig):
    """Keys under `method` that these methods share."""

    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    hidden: list[int] = hidden_widths([8192, 8192])
    embedding: int = setting(8192, "Dimension of the embeddings.", at_least=1, at_most=2**24)

    def check(self, config: Config) -> None:
        """An image has two views; statistics are those of several images."""
        require_two_views(config)
        train = config.train
        images = train.global_batch // (train.accumulate if train.loss_spans == "micro_batch" else 1)
        require(images >= 2, "train.global_batch", train.global_batch, "two images or more that the loss spans")


class RedundancyReduction(JointEmbedding):
    """Backbone and projection; a subclass makes the `projection`. Evidence: `embeddings` [2, B, D].

    Nothing goes on from step to step.
    """

    head_name = "projection"
    projection: nn.Module
    terms: ClassVar[tuple[str, ...]]
    """Names of the terms of the loss, which are signs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert isinstance(config.method, RedundancySettings)
        self.backbone, self.num_features = build_backbone(config.model)
        self.signs = self.embedding_signs(config.method.embedding) | {name: Sign() for name in self.terms}

    def embed(self, views: Views) -> Named:
        """`embeddings` [2, B, D]."""
        return {"embeddings": torch.stack([self.projection(self.backbone(view)) for view in each_view(views)])}

    def output(self, loss: Tensor, terms: tuple[Tensor, ...], embeddings: Tensor) -> Output:
        """What `loss` returns, of embeddings [2, B, D]."""
        z = embeddings.detach()
        # What all embeddings have in common costs nothing here, so it is no sign of collapse.
        apart = z - z.mean(1, keepdim=True) if z.shape[1] > 1 else z
        named = {name: value.detach() for name, value in zip(self.terms, terms, strict=True)}
        return Output(loss, self.watch_embeddings(*unit(apart)) | named, {"embeddings": z})
