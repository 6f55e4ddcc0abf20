"""Shared by methods in which a prediction from one view is compared with the embedding of another.

Views pass one by one, so BatchNorm's statistics are those of one view, as in the published code. With multi-crop (SwAV,
arXiv 2006.09882) every view predicts; the large views alone are predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from largescale.config import Config, MethodConfig
from largescale.config.setting import setting
from largescale.data.views import Views
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import JointEmbedding, unit
from largescale.methods.method import Output
from largescale.methods.multi_crop import each_view, num_large, require_two_large
from largescale.models.backbones import build_backbone
from largescale.models.heads import hidden_widths


@dataclass
class PredictingSettings(MethodConfig):
    """Keys under `method` that these methods share."""

    hidden: list[int] = hidden_widths()
    embedding: int = setting(256, "Dimension of the embeddings.", at_least=1, at_most=2**24)

    def check(self, config: Config) -> None:
        """There are large views to predict each other."""
        require_two_large(config)


class Predicting(JointEmbedding):
    """Backbone, projection and predictor of the network that is trained.

    A subclass makes `projection` and `predictor`. Evidence: `predictions` [V, B, D], `targets` [A, B, D].

    Attributes:
        num_large: A, the views that are predicted.
    """

    head_name = "projection"
    projection: nn.Module
    predictor: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert isinstance(config.method, PredictingSettings)
        self.num_large = num_large(config.data.crops)
        self.backbone, self.num_features = build_backbone(config.model)
        self.signs = self.embedding_signs(config.method.embedding)

    def embed(self, views: Views) -> Named:
        """`predictions` of all views [V, B, D], and the `embeddings` of the large ones [A, B, D]."""
        z = [self.projection(self.backbone(view)) for view in each_view(views)]
        predictions = torch.stack([self.predictor(one) for one in z])
        return {"predictions": predictions, "embeddings": torch.stack(z[: self.num_large])}

    def output(self, loss: Tensor, predictions: Tensor, targets: Tensor, embeddings: Tensor) -> Output:
        """What `loss` returns: the signs are those of the first two large views' embeddings [A, B, D]."""
        first, second = unit(embeddings[:2].detach())
        evidence = {"predictions": predictions.detach(), "targets": targets.detach()}
        return Output(loss, self.watch_embeddings(first, second), evidence)
