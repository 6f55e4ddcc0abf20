"""NNCLR: the nearest neighbour of a view, among embeddings of earlier batches, picks what is predicted from the image's
other view (arXiv 2104.14548).

Loss for unit embeddings z and unit predictions p of two views, and a queue of the last K embeddings, the naive loop::

    for a, b in [(0, 1), (1, 0)]:
        for i in images:
            near = max(queue, key=lambda row: row @ z[a][i])
            others = [exp(near @ p[b][n] / temperature) for n in images]
            loss += -log(exp(near @ p[b][i] / temperature) / sum(others)) / (2 * N)
    queue = queue[N:] + z[0]                    # after the loss of the whole batch

over the images of all ranks. With multi-crop the neighbours are those of the large views, and predictions are made from
all; the loss is the mean over all pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from largescale.config import Config
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.methods.choice import Choice
from largescale.methods.contrastive import Contrastive, images_of_loss
from largescale.methods.embedding_method import SPANS, Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.over_ranks import all_ranks, gathered, own_places
from largescale.methods.losses.picks import Picks, among_gathered
from largescale.methods.method import Output, Panel, Sign
from largescale.methods.predicting import Predicting, PredictingSettings
from largescale.methods.queue import (
    Queue,
    complaints_of_queue,
    max_queue_setting,
    queue_setting,
    require_queue,
    suited_queue,
)
from largescale.models.heads import hidden_widths, mlp


@dataclass
class Settings(PredictingSettings):
    """NNCLR's keys under `method`."""

    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    hidden: list[int] = hidden_widths([2048, 2048])
    predictor_hidden: list[int] = hidden_widths([4096], "the predictor")
    temperature: float = setting(0.1, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)
    queue: int = queue_setting(98304)
    max_queue_gb: float = max_queue_setting()

    def check(self, config: Config) -> None:
        """There are large views to have neighbours; the queue holds whole batches, not too many."""
        super().check(config)
        require_queue(config, self.queue, self.embedding, max_gb=self.max_queue_gb)


class NNCLR(Predicting, Contrastive):
    """Backbone, projection, predictor and queue, and the loss of a batch.

    Signs: `neighbour`, the cosine of an embedding and its nearest neighbour. Evidence: `predictions` [V, B, D],
    `embeddings` [A, B, D] of the large views.
    """

    title = "NNCLR"
    reference = "nnclr/resnet50_1000ep"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = self.config = _settings(config)
        width = settings.embedding
        self.projection = mlp(
            [self.num_features, *settings.hidden, width], bias=False, last_bias=False, last_norm="affine"
        )
        self.predictor = mlp([width, *settings.predictor_hidden, width], bias=False, last_bias=True)
        self.queue = Queue(config, settings.queue, width)
        self.signs |= {"picked": Sign(), "neighbour": Sign()}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches; all of a step share their queue.

        Collectives: those of `gather_rows`, once for the predictions of all views; one all-gather of embeddings.
        """
        predictions, embeddings = unit(inputs["predictions"]), unit(inputs["embeddings"].detach())
        near, cosine = self._neighbours(embeddings)
        picks = self._picks(near, predictions)
        loss = torch.stack([one.loss() * len(one.right) for one in picks]).sum() / sum(len(one.right) for one in picks)
        self.queue.keep(embeddings[0], step)
        signs = self.watch(embeddings[0], embeddings[1], *picks) | {"neighbour": cosine}
        return Output(loss, signs, {"predictions": predictions.detach(), "embeddings": embeddings})

    @torch.no_grad()
    def _neighbours(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest rows of the queue [A, B, D], and their mean cosine."""
        rows = self.queue.rows.to(embeddings.dtype)
        with torch.autocast(rows.device.type, enabled=False):
            cosines, places = (embeddings @ rows.T).max(-1)
        return rows[places], cosines.mean()

    def _picks(self, near: Tensor, predictions: Tensor) -> list[Picks]:
        """For each view, whether neighbours of the image's other views pick its prediction."""
        group = all_ranks()
        partners = own_places(predictions.shape[1], group, predictions.device)
        candidates = gathered(predictions.transpose(0, 1), group).unbind(1)
        return [
            among_gathered(
                torch.cat([near[:view], near[view + 1 :]]).flatten(0, 1), of_view, partners, self.config.temperature
            )
            for view, of_view in enumerate(candidates)
        ]

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
        return {"all views alike": math.log(images_of_loss(config))}

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How close neighbours are, after the panels of all."""
        near = Panel("Nearest neighbours", {"cosine with the nearest of the queue": "neighbour"}, limits=(0, 1.05))
        return [*super().panels(config), near]


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
