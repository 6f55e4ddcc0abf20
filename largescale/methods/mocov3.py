"""MoCo v3: predictions from each view pick what a slowly following network sees in another, among the keys of the batch
(arXiv 2104.02057).

Loss for unit predictions q of the student and unit embeddings k of the teacher, two views, the naive loop::

    for a, b in [(0, 1), (1, 0)]:
        for i in images:
            keys = [exp(q[a][i] @ k[b][n] / temperature) for n in images]
            loss += -2 * temperature * log(keys[i] / sum(keys)) / N

over the images of all ranks. With multi-crop every view predicts, and the large ones alone are keys; the loss is then
twice the mean over all pairs of a large view and another one.

The teacher is in training mode and normalises by its own batch. After the update of step t it keeps m(t + 1) of itself,
where m(t) rises from `momentum` at t = 0 to 1 at the end by half a cosine. The published code averages at the start of
step t + 1 instead, before it computes keys, which is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from largescale.config import Config
from largescale.config.setting import setting
from largescale.methods.bootstrapped import Bootstrapped, TeacherSettings
from largescale.methods.contrastive import Contrastive, images_of_loss
from largescale.methods.embedding_method import SPANS, Named
from largescale.methods.joint_embedding import unit
from largescale.methods.losses.over_ranks import all_ranks, gathered, own_places
from largescale.methods.losses.picks import among_gathered
from largescale.methods.method import Output, Sign
from largescale.models.heads import hidden_widths, mlp


@dataclass
class Settings(TeacherSettings):
    """MoCo v3's keys under `method`."""

    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    hidden: list[int] = hidden_widths([4096])
    predictor_hidden: list[int] = hidden_widths([4096], "the predictor")
    temperature: float = setting(
        1.0, "Divides cosines before the softmax; 0.2 for small images.", at_least=1e-6, at_most=1e6
    )


class MoCoV3(Bootstrapped, Contrastive):
    """Student with predictor, teacher, and the loss of a batch."""

    title = "MoCo v3"
    reference = "mocov3/resnet50_100ep"
    Settings = Settings

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = self.config = _settings(config)
        width = settings.embedding
        self.projection = mlp(
            [self.num_features, *settings.hidden, width], bias=False, last_bias=False, last_norm="plain"
        )
        self.predictor = mlp([width, *settings.predictor_hidden, width], bias=False, last_bias=False)
        self.make_teacher()
        self.signs |= {"picked": Sign()}

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch, or of one of its micro-batches, whose keys are then the candidates.

        Collectives: one all-gather of the keys of all large views.
        """
        queries, keys = unit(inputs["predictions"]), unit(inputs["targets"])
        group, temperature = all_ranks(), self.config.temperature
        partners = own_places(keys.shape[1], group, keys.device)
        picks = []
        for view, candidates in enumerate(gathered(keys.transpose(0, 1), group).unbind(1)):
            others = torch.cat([queries[:view], queries[view + 1 :]]).flatten(0, 1)
            picks.append(among_gathered(others, candidates, partners, temperature))
        loss = 4 * temperature * torch.stack([one.loss() for one in picks]).mean()
        first, second = unit(inputs["embeddings"][:2])
        evidence = {"queries": queries.detach(), "keys": keys}
        return Output(loss, self.watch(first, second, *picks), evidence)

    def average_momentum(self, step: int) -> float:
        """From the setting to 1, by a cosine that is one step ahead."""
        return super().average_momentum(step + 1)

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss if all embeddings were equal."""
        return {"all views alike": 4 * _settings(config).temperature * math.log(images_of_loss(config))}


def _settings(config: Config) -> Settings:
    assert isinstance(config.method, Settings)
    return config.method
