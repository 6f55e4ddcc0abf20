"""DenseCL: MoCo for whole images and for the cells of their feature maps (arXiv 2011.09157).

Each cell of the first view picks the cell of the second view that it corresponds to, among pooled maps of earlier
batches. Loss of the dense part for unit vectors r and t of the cells of two views and a queue of the last K pooled
maps, the naive loop::

    for i in images:
        for a in cells of the first view:
            b = argmax over cells of the second view of cosine(first backbone map[i, a], second backbone map[i, b])
            others = [exp(r[i, a] @ n / temperature) for n in dense_queue]
            mine = exp(r[i, a] @ t[i, b] / temperature)
            loss += -log(mine / (mine + sum(others)))
    loss /= num images * num cells
    dense_queue = dense_queue[N:] + [unit(mean of image's cells before they are unit vectors)]

The whole loss is (1 - w) times MoCo's and w times this, where w is 0 until `dense_start_step`.

The departure of `moco.py` holds: keys come from a network in evaluation mode whose running statistics follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from largescale.config import Config
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.picks import Picks, among_others
from largescale.methods.method import Average, Output, Panel, Row, Sign
from largescale.methods.milestone import Milestone
from largescale.methods.moco import MoCo, MoCoSettings
from largescale.methods.multi_crop import each_view, require_two_views
from largescale.methods.queue import Queue
from largescale.methods.teachers import following, teacher_of
from largescale.models.backbones import feature_map, map_channels, pooled
from largescale.models.heads import CellLinear


@dataclass
class Settings(MoCoSettings):
    """DenseCL's keys under `method`: MoCo's, and those of its dense part."""

    num_queues: ClassVar[int] = 2

    temperature: float = setting(0.2, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)
    dense_weight: float = setting(
        0.5, "Share of the dense part in the loss.", at_least=0, at_most=1, expected="a share from 0 to 1"
    )
    dense_start_step: int = setting(
        1000, "First step with the dense part; before, correspondences are arbitrary.", at_least=0, at_most=10**12
    )

    def check(self, config: Config) -> None:
        """Two views: cells of small views would stand for parts of those of large ones."""
        super().check(config)
        require_two_views(config)


class DenseCL(MoCo):
    """MoCo with a second head, for the cells of the backbone's map, and a second queue.

    `grids` are [B, h * w, C], cell after cell. Evidence: `queries`, `keys` [B, D].
    """

    title = "DenseCL"
    reference = "densecl/resnet50_200ep"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = self.dense_config = _settings(config)
        channels = map_channels(config.model, self.num_features)
        self.dense_projection = _dense_head([channels, *settings.hidden, settings.embedding])
        self.teacher.update(dict(teacher_of(dense_projection=self.dense_projection).eval().items()))
        self.dense_queue = Queue(config, settings.queue, settings.embedding, number=1)
        self.signs |= {"dense_loss": Sign(), "dense_picked": Sign()}

    def embed(self, views: Views) -> Named:
        """Of the first view: `queries` [1, B, D] and `dense_queries` [1, B, h * w, D], unit vectors; `query_cells`
        [1, B, h * w, C] of the backbone's map, unit vectors without a gradient.
        """
        maps = feature_map(self.backbone, each_view(views)[1 - self._key])
        return {
            "queries": unit(self.projection(pooled(self.backbone, maps)))[None],
            "dense_queries": unit(_cells(self.dense_projection(maps)))[None],
            "query_cells": unit(_cells(maps.detach()))[None],
        }

    def targets(self, views: Views) -> Named:
        """Of the second view, by the teacher: `keys` [1, B, D], `dense_keys`, `key_cells` like those of `embed`, and
        `pooled_keys` [1, B, D], unit vectors of whole dense maps.
        """
        maps = feature_map(self.teacher["backbone"], each_view(views)[self._key])
        dense = self.teacher["dense_projection"](maps)
        return {
            "keys": unit(self.teacher["projection"](pooled(self.teacher["backbone"], maps)))[None],
            "dense_keys": unit(_cells(dense))[None],
            "key_cells": unit(_cells(maps))[None],
            "pooled_keys": unit(dense.mean((2, 3)))[None],
        }

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; all of a step share their candidates.

        Collectives: one all-gather of the keys, one of the pooled keys.
        """
        whole = super().loss(inputs, ids, step)
        dense = self.dense_picks(inputs)
        self.dense_queue.keep(inputs["pooled_keys"][0], step)
        dense_loss, weight = dense.loss(), self.dense_weight(step)
        signs = {"dense_loss": dense_loss.detach(), "dense_picked": dense.picked()}
        return whole._replace(loss=(1 - weight) * whole.loss + weight * dense_loss, signs=whole.signs | signs)

    def dense_picks(self, inputs: Named) -> Picks:
        """Every cell of the first view picks the one of the second view that it corresponds to."""
        queries, keys = inputs["dense_queries"][0], inputs["dense_keys"][0]
        with torch.autocast(queries.device.type, enabled=False):
            nearest = (inputs["query_cells"][0] @ inputs["key_cells"][0].transpose(1, 2)).argmax(2, keepdim=True)
            corresponding = keys.gather(1, nearest.expand(-1, -1, keys.shape[2]))
        rows = self.dense_queue.rows
        return among_others(queries.flatten(0, 1), corresponding.flatten(0, 1), rows, self.config.temperature)

    def dense_weight(self, step: int) -> float:
        """Share of the dense part in the loss of a step."""
        return self.dense_config.dense_weight if step >= self.dense_config.dense_start_step else 0.0

    def averages(self) -> list[Average]:
        """The teacher follows in weights and running statistics."""
        return following("teacher", "backbone", "projection", "dense_projection", buffers=True)

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """Both queues."""
        return super().state(mesh) | {"dense_queue": self.dense_queue.whole(mesh)}

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """Also the dense part within the first tenth of the run."""
        step = min(_settings(config).dense_start_step, length.num_steps // 10)
        return super().suited(config, length) | {"dense_start_step": Choice(step, "a tenth of the run at most")}

    @classmethod
    def milestones(cls, config: Config) -> list[Milestone]:
        """When the dense part begins."""
        step = _settings(config).dense_start_step
        return [Milestone("method.dense_start_step", step, "the dense part of the loss counts")]

    @classmethod
    def brief(cls, row: Row) -> str:
        """How often the right view and the right cell were picked."""
        if "dense_picked" not in row:
            return super().brief(row)
        return f" ({row['picked']:.0%} of views picked, {row['dense_picked']:.0%} of cells)"

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How well cells find each other, before the panels of all."""
        cells = Panel("Cells", {"share that pick the corresponding cell": "dense_picked"}, limits=(0, 1.05))
        return [cells, *super().panels(config)]


def _dense_head(widths: list[int]) -> nn.Sequential:
    """The projection head without BatchNorm as 1x1 convolutions: [B, C, h, w] to [B, D, h, w]."""
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers += [CellLinear(width, next_width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def _cells(maps: Tensor) -> Tensor:
    """Maps [B, C, h, w] to cells [B, h * w, C]."""
    return maps.flatten(2).transpose(1, 2)


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
