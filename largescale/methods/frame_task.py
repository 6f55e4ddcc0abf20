"""Shared by pretext tasks on frames of a clip: the backbone sees a frame at a time, what stands on it compares them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn

from largescale.config import Config, FrameConfig
from largescale.config.schema import MethodConfig
from largescale.data.views import Views
from largescale.methods.pretext_task import PretextTask
from largescale.models.backbones import build_backbone
from largescale.models.heads import hidden_widths


@dataclass
class FrameSettings(MethodConfig):
    """Keys under `method` of tasks on frames."""

    frames: FrameConfig = field(default_factory=FrameConfig)
    embedding: list[int] = hidden_widths((4096, 4096), of="the layers that each frame goes through", min_length=1)


class FrameTask(PretextTask):
    """Backbone, and an embedding of every frame: layers with BatchNorm and ReLU, the same for all frames."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.backbone, self.num_features = build_backbone(config.model)
        widths = [self.num_features, *settings_of(config).embedding]
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width), nn.ReLU(inplace=True)]
        self.frame_head = nn.Sequential(*layers)

    def embedded(self, views: Views) -> Tensor:
        """Embeddings of frames, [B, F, D]."""
        return self.frame_head(self.backbone(views.images[0])).unflatten(0, (-1, len(views.ids))).transpose(0, 1)


def settings_of(config: Config) -> FrameSettings:
    """The keys under `method`."""
    assert isinstance(config.method, FrameSettings)
    return config.method
