"""MoCo: a view picks its image's other view, seen by a slowly following network, among keys of earlier batches.

Loss for unit queries q and keys k of a batch, and a queue of the last K keys, the naive loop::

    for i in images:
        for q in queries of i:                  # one, but for multi-crop
            others = [exp(q @ n / temperature) for n in queue]
            mine = exp(q @ k[i] / temperature)
            loss += -log(mine / (mine + sum(others)))
    loss /= number of queries
    queue = queue[N:] + k                       # after the loss of the whole batch

The key of an image is the last of its large views. Every other view is a query, so that small ones pick a large one
(multi-crop: SwAV, arXiv 2006.09882; the same for MoCo in CLSA, 2104.07713).

One departure: the published code shuffles keys between GPUs, so that their BatchNorm does not tell which image a key
is of, which depends on the number of GPUs. Here keys come from a network in evaluation mode, whose running statistics
follow the student's like its weights do (EMAN, arXiv 2101.08482); it needs no exchange either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from largescale.config import Config
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.contrastive import Contrastive, ContrastiveSettings
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.picks import among_others
from largescale.methods.method import Average, Output
from largescale.methods.multi_crop import each_view, num_large, require_large_first
from largescale.methods.queue import (
    Queue,
    complaints_of_queue,
    max_queue_setting,
    queue_setting,
    require_queue,
    suited_queue,
)
from largescale.methods.teachers import following, teacher_of
from largescale.models.backbones import build_backbone
from largescale.models.heads import projection_head


@dataclass
class MoCoSettings(ContrastiveSettings):
    """Keys under `method` that versions of MoCo with a queue share."""

    momentum: float = setting(
        0.999,
        "Fraction of its weights that the key network keeps per step; 0.99 for short runs.",
        at_least=0,
        at_most=1,
    )
    queue: int = queue_setting()
    max_queue_gb: float = max_queue_setting()
    num_queues: ClassVar[int] = 1

    def check(self, config: Config) -> None:
        """The queue holds whole batches, not too many; keys are of large views."""
        super().check(config)
        require_large_first(config)
        require_queue(config, self.queue, self.embedding, max_gb=self.max_queue_gb, queues=self.num_queues)


class MoCo(Contrastive):
    """Student and teacher, each a backbone and a projection head, the queue of keys, and the loss of a batch.

    The teacher after the update of step t is `momentum` * itself + (1 - `momentum`) * the student after that update;
    the published code does the same at the start of step t + 1. Evidence: `queries` [V - 1, B, D], `keys` [B, D].
    """

    head_name = "projection"

    def __init__(self, config: Config) -> None:
        super().__init__()
        settings = self.config = _settings(config)
        self._key = num_large(config.data.crops) - 1
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(self.num_features, settings.hidden, settings.embedding, batchnorm=False)
        self.teacher = teacher_of(backbone=self.backbone, projection=self.projection).eval()
        self.queue = Queue(config, settings.queue, settings.embedding)
        self.signs = self.contrastive_signs(settings.embedding)

    def train(self, mode: bool = True) -> Self:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def embed(self, views: Views) -> Named:
        """`queries` [V - 1, B, D], unit vectors."""
        features = torch.cat([self.backbone(images) for images in self._queries(views)])
        return {"queries": unit(self.projection(features)).unflatten(0, (-1, len(views.ids)))}

    def targets(self, views: Views) -> Named:
        """`keys` [1, B, D], unit vectors."""
        images = each_view(views)[self._key]
        return {"keys": unit(self.teacher["projection"](self.teacher["backbone"](images)))[None]}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; all of a step share their candidates.

        Collectives: one all-gather of the keys.
        """
        queries, keys = inputs["queries"], inputs["keys"][0]
        picks = among_others(queries.flatten(0, 1), keys, self.queue.rows, self.config.temperature)
        self.queue.keep(keys, step)
        evidence = {"queries": queries.detach(), "keys": keys}
        return Output(picks.loss(), self.watch(queries[0], keys, picks), evidence)

    def averages(self) -> list[Average]:
        """The teacher follows in weights and running statistics."""
        return following("teacher", "backbone", "projection", buffers=True)

    def average_momentum(self, step: int) -> float:
        """The same in all steps."""
        return self.config.momentum

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """The queue."""
        return {"queue": self.queue.whole(mesh)}

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """The queue, of whole batches."""
        return suited_queue(config, length, _settings(config).queue)

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """Whether the queue fits the number of images."""
        return complaints_of_queue(config, length, _settings(config).queue)

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss if all embeddings were equal."""
        return {"all views alike": math.log(_settings(config).queue + 1)}

    def _queries(self, views: Views) -> Iterator[Tensor]:
        """The views that are queries, those of a crop group together, [num * B, 3, S, S] each."""
        first = 0
        for group in views.images:
            of_group = group.split(len(views.ids))
            queries = [view for place, view in enumerate(of_group, first) if place != self._key]
            if queries:
                yield torch.cat(queries)
            first += len(of_group)


def _settings(config: Config) -> MoCoSettings:
    assert isinstance(config.method, MoCoSettings)
    return config.method
