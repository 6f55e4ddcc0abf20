"""SimCLR: each view picks the other view of its image among all views of the batch (arXiv 2002.05709, section 2).

Loss for unit embeddings z of the 2 N views of a global batch, the naive loop::

    for i in views:
        others = [exp(z[i] @ z[n] / temperature) for n in views if n != i]
        loss += -log(exp(z[i] @ z[partner of i] / temperature) / sum(others))
    loss /= 2 * N

Views of other ranks are candidates like this rank's own, with their gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from largescale.config import Config, MethodConfig, require
from largescale.config.setting import setting
from largescale.data.views import Views
from largescale.distributed.collectives import gather_rows
from largescale.methods.method import Method, Output, Panel, Row, Sign
from largescale.models.backbones import build_backbone
from largescale.processes import rank

_ONE_PLACE = 0.05
"""Spread of unit embeddings below which they all point the same way."""


@dataclass
class Settings(MethodConfig):
    """SimCLR's keys under `method`."""

    hidden: list[int] = setting(
        [2048], "Hidden widths of the projection head; two of them are SimCLRv2's.", at_least=1, at_most=2**24,
        expected="widths of at least 1 and at most 16777216")
    embedding: int = setting(128, "Dimension in which views are compared.", at_least=1, at_most=2**24)
    temperature: float = setting(0.1, "Cosines are divided by it.", at_least=1e-6, at_most=1e6)

    def check(self, config: Config) -> None:
        """An image has two views, of one size or of two."""
        views = [group.num for group in config.data.crops]
        require(sum(views) == 2, "data.crops", f"{sum(views)} views",
                f"two views in all with method.name={self.name}, such as [{{num: 2, size: 224}}]")


class SimCLR(Method):
    """Backbone, projection head, and the loss between two views. Nothing goes on from step to step.

    Signs: `mean_embedding` [D], whose length says how much embeddings differ; `picked`, the share of views whose
    partner is the nearest of all candidates. Evidence: `embeddings` [2, B, D].
    """

    title = "SimCLR"
    Settings: ClassVar[type[MethodConfig]] = Settings

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert isinstance(config.method, Settings)
        self.config = config.method
        self.backbone, self.num_features = build_backbone(config.model)
        self.projection = _head(self.num_features, self.config.hidden, self.config.embedding)
        self.signs = {"mean_embedding": Sign(shape=(self.config.embedding,)), "picked": Sign()}

    def forward(self, views: Views, step: int) -> Output:
        """The loss of one batch (with `train.accumulate`: of one of its micro-batches, with its own candidates).

        Collectives: those of `gather_rows`, once.
        """
        z = self.projection(torch.cat([self.backbone(group) for group in views.images]))
        with torch.autocast(z.device.type, enabled=False):
            z = normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
            candidates = gather_rows(z)
            num, first = len(z), rank() * len(z)
            own = torch.arange(num, device=z.device)
            logits = (z @ candidates.T / self.config.temperature).masked_fill(
                torch.nn.functional.one_hot(first + own, len(candidates)).bool(), -math.inf)
            partner = first + (own + num // 2) % num
            loss = cross_entropy(logits, partner)
        detached, picked = z.detach(), (logits.detach().argmax(1) == partner).to(z.dtype).mean()
        signs = {"mean_embedding": detached.mean(0), "picked": picked}
        return Output(loss, signs, {"embeddings": detached.unflatten(0, (2, -1))})

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """How often the partner was picked, and 1 - |mean of the unit embeddings|^2, which is 0 if all are equal."""
        return {"picked": float(signs["picked"]),
                "embedding_spread": max(0.0, 1 - float(signs["mean_embedding"].square().sum()))}

    @classmethod
    def brief(cls, row: Row) -> str:
        """How often the right view was picked."""
        return f" ({row['picked']:.0%} picked)"

    @classmethod
    def diagnose(cls, before: Row, row: Row) -> str:
        """All embeddings in one place."""
        if row.get("embedding_spread", 1.0) >= _ONE_PLACE or before.get("embedding_spread", 1.0) >= _ONE_PLACE:
            return ""
        return (f"embeddings are nearly equal (spread {row['embedding_spread']:.2%}): this looks like collapse. Try, "
                f"in another run.dir, a lower optim.lr or a longer optim.warmup_epochs")

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss if all embeddings were equal."""
        views = 2 * config.train.global_batch // config.train.accumulate
        return {"all views alike": math.log(views - 1)}

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How well views find each other, and how far embeddings are apart."""
        return [Panel("Views", {"share that pick their partner": "picked", "spread of embeddings": "embedding_spread"},
                      limits=(0, 1.05))]


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
