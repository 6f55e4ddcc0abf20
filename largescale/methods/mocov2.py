"""MoCo v2: a view picks its image's other view, seen by a slowly following network, among keys of earlier batches
(arXiv 1911.05722; 2003.04297).

Loss for unit queries q and keys k of a batch, and a queue of the last K keys, the naive loop::

    for i in images:
        others = [exp(q[i] @ n / temperature) for n in queue]
        mine = exp(q[i] @ k[i] / temperature)
        loss += -log(mine / (mine + sum(others)))
    loss /= N
    queue = queue[N:] + k                       # after the loss of the whole batch

One departure: the published code shuffles keys between GPUs, so that their BatchNorm does not tell which image a key
is of, which depends on the number of GPUs. Here keys come from a network in evaluation mode, whose running statistics
follow the student's like its weights do (EMAN, arXiv 2101.08482); it needs no exchange either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import normalize

from largescale.config import Config, require
from largescale.config.setting import setting
from largescale.data.views import Views
from largescale.distributed.collectives import gather_rows
from largescale.methods.contrastive import Contrastive, ContrastiveSettings
from largescale.methods.embedding_method import Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.picks import among_others
from largescale.methods.method import Average, Output
from largescale.methods.teachers import following, teacher_of
from largescale.models.backbones import build_backbone
from largescale.models.heads import projection_head
from largescale.processes import world_size


@dataclass
class Settings(ContrastiveSettings):
    """MoCo v2's keys under `method`."""

    temperature: float = setting(0.2, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)
    momentum: float = setting(
        0.999,
        "Fraction of its weights that the key network keeps per step; 0.99 for short runs.",
        at_least=0,
        at_most=1,
    )
    queue: int = setting(
        65536,
        "Keys of earlier steps to pick from; a multiple of train.global_batch, fewer than the images.",
        at_least=1,
        at_most=2**40,
    )

    def check(self, config: Config) -> None:
        """An image has two views; the queue holds whole batches."""
        super().check(config)
        batch = config.train.global_batch
        require(self.queue % batch == 0, "method.queue", self.queue, f"a multiple of train.global_batch={batch}")


class MoCoV2(Contrastive):
    """Student and teacher, each a backbone and a projection head, the queue of keys, and the loss of a batch.

    The queue is the same on all ranks, in the order of the batch whatever their number. Evidence: `queries`, `keys`
    [B, D].
    """

    title = "MoCo v2"
    head_name = "projection"
    Settings = Settings
    queue: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert isinstance(config.method, Settings)
        self.config, self._seed = config.method, config.run.seed
        self._batch, self._micro_batches = config.train.global_batch, config.train.accumulate
        self._piece = self._batch // self._micro_batches // world_size()
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = projection_head(self.num_features, self.config.hidden, self.config.embedding, batchnorm=False)
        self.teacher = teacher_of(backbone=self.backbone, projection=self.projection).eval()
        self.signs = self.contrastive_signs(self.config.embedding)
        self.register_buffer("queue", torch.zeros(self.config.queue, self.config.embedding), persistent=False)
        self._fresh: list[Tensor] = []
        self.finish_initialisation()

    def finish_initialisation(self) -> None:
        """Fill the queue with random unit rows; `models.initialise` calls it as well."""
        generator = torch.Generator().manual_seed(self._seed)
        rows = torch.randn(self.queue.shape, generator=generator, device="cpu")
        with torch.no_grad():
            self.queue.copy_(normalize(rows, dim=1))

    def train(self, mode: bool = True) -> MoCoV2:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def embed(self, views: Views) -> Named:
        """`queries` [1, B, D], unit vectors, of the first view."""
        first, _ = _split(views)
        return {"queries": unit(self.projection(self.backbone(first)))[None]}

    def targets(self, views: Views) -> Named:
        """`keys` [1, B, D], unit vectors, of the second view."""
        _, second = _split(views)
        return {"keys": unit(self.teacher["projection"](self.teacher["backbone"](second)))[None]}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; all of a step share their candidates.

        Collectives: one all-gather of the keys.
        """
        queries, keys = inputs["queries"][0], inputs["keys"][0]
        picks = among_others(queries, keys, self.queue, self.config.temperature)
        self._keep(keys, step)
        return Output(picks.loss(), self.watch(queries, keys, picks), {"queries": queries.detach(), "keys": keys})

    def _keep(self, keys: Tensor, step: int) -> None:
        """Put the keys of a step in the place of the oldest, once its last micro-batch is through."""
        # Ranks hold a piece of each micro-batch: [ranks, micro-batches, B, D].
        pieces = gather_rows(keys).view(world_size(), -1, self._piece, keys.shape[1])
        self._fresh += pieces.transpose(0, 1).flatten(1, 2).to(self.queue.dtype)
        if len(self._fresh) == self._micro_batches:
            first, queue = step * self._batch % len(self.queue), self.queue.clone()  # the loss still needs the old one
            queue[first : first + self._batch] = torch.cat(self._fresh)
            self.queue = queue
            self._fresh.clear()

    def averages(self) -> list[Average]:
        """The teacher follows in weights and running statistics."""
        return following("teacher", "backbone", "projection", buffers=True)

    def average_momentum(self, step: int) -> float:
        """The same in all steps."""
        return self.config.momentum

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """The queue, which all ranks hold."""
        return {"queue": DTensor.from_local(self.queue, mesh, [Replicate()], run_check=False)}

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss if all embeddings were equal."""
        assert isinstance(config.method, Settings)
        return {"all views alike": math.log(config.method.queue + 1)}


def _split(views: Views) -> list[Tensor]:
    """The views of each image, [B, 3, S, S] each, whether they are of one crop group or of two."""
    return [view for group in views.images for view in group.split(len(views.ids))]
