"""Shared by methods in which a view picks its partner among candidates: what to watch, and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import Config, MethodConfig, require
from largescale.config.setting import setting
from largescale.methods.embedding_method import SPANS, EmbeddingMethod
from largescale.methods.method import Panel, Row, Sign
from largescale.models.heads import hidden_widths

_ONE_PLACE = 0.05
"""Spread of unit embeddings below which they all point the same way."""


@dataclass
class ContrastiveSettings(MethodConfig):
    """Keys under `method` that these methods share."""

    loss_spans: ClassVar[tuple[str, ...]] = SPANS

    hidden: list[int] = hidden_widths()
    embedding: int = setting(128, "Dimension in which views are compared.", at_least=1, at_most=2**24)
    temperature: float = setting(0.1, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)

    def check(self, config: Config) -> None:
        """An image has two views, of one size or of two."""
        views = sum(group.num for group in config.data.crops)
        require(
            views == 2,
            "data.crops",
            f"{views} views",
            f"two views in all with method.name={self.name}, such as [{{num: 2, size: 224}}]",
        )


def contrastive_signs(embedding: int) -> dict[str, Sign]:
    """`mean_embedding` [D], whose length says how much embeddings differ, and `picked`, the share of views whose
    partner is the nearest of all candidates.
    """
    return {"mean_embedding": Sign(shape=(embedding,)), "picked": Sign()}


def unit(z: Tensor) -> Tensor:
    """Rows [N, D] of length 1, in float32 (float64 for float64 ones) under any autocast."""
    with torch.autocast(z.device.type, enabled=False):
        return normalize(z if z.dtype == torch.float64 else z.float(), dim=1)


class Contrastive(EmbeddingMethod):
    """A method with the signs of `contrastive_signs`."""

    @staticmethod
    @torch.no_grad()
    def watch(embeddings: Tensor, logits: Tensor, partner: Tensor) -> dict[str, Tensor]:
        """The signs.

        Args:
            embeddings: unit vectors [N, D].
            logits: of candidates [N, C].
            partner: which candidate is the right one, int64 [N].
        """
        picked = (logits.argmax(1) == partner).to(embeddings.dtype).mean()
        return {"mean_embedding": embeddings.detach().mean(0), "picked": picked}

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """How often the partner was picked, and 1 - |mean of the unit embeddings|^2, which is 0 if all are equal."""
        return {
            "picked": float(signs["picked"]),
            "embedding_spread": max(0.0, 1 - float(signs["mean_embedding"].square().sum())),
        }

    @classmethod
    def brief(cls, row: Row) -> str:
        """How often the right view was picked."""
        return f" ({row['picked']:.0%} picked)"

    @classmethod
    def diagnose(cls, config: Config, before: Row, row: Row) -> str:
        """Warn if all embeddings are in one place."""
        if row.get("embedding_spread", 1.0) >= _ONE_PLACE or before.get("embedding_spread", 1.0) >= _ONE_PLACE:
            return ""
        return (
            f"embeddings are nearly equal (spread {row['embedding_spread']:.2%}): this looks like collapse. Try, "
            f"in another run.dir, optim.lr={config.optim.lr / 2:.2g} or a longer optim.warmup_epochs"
        )

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How well views find each other, and how far apart embeddings are."""
        return [
            Panel(
                "Views",
                {"share that pick their partner": "picked", "spread of embeddings": "embedding_spread"},
                limits=(0, 1.05),
            )
        ]
