"""Shared by methods in which a view picks its partner among candidates: what to watch, and what it means."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from largescale.config import Config, MethodConfig, require
from largescale.config.setting import setting
from largescale.methods.joint_embedding import JointEmbedding
from largescale.methods.losses.picks import Picks
from largescale.methods.method import Panel, Row, Sign, Symptom
from largescale.models.heads import hidden_widths

_TOLD_APART = 0.95
"""Share of the loss of equal embeddings below which they are not. At MoCo v3's temperature of 1 the best is 0.88."""


@dataclass
class ContrastiveSettings(MethodConfig):
    """Keys under `method` that these methods share."""

    hidden: list[int] = hidden_widths()
    embedding: int = setting(128, "Dimension in which views are compared.", at_least=1, at_most=2**24)
    temperature: float = setting(0.1, "Divides cosines before the softmax.", at_least=1e-6, at_most=1e6)

    def check(self, config: Config) -> None:
        """An image has two views at least, of any sizes."""
        views = sum(group.num for group in config.data.crops)
        expected = f"two or more views with method.name={self.name}, such as [{{num: 2, size: 224}}]"
        require(views >= 2, "data.crops", f"{views} view", expected)


class Contrastive(JointEmbedding):
    """A method with one sign more: `picked`, the share of views whose partner is the nearest of all candidates."""

    @classmethod
    def contrastive_signs(cls, embedding: int) -> dict[str, Sign]:
        """Declarations of what `watch` returns, for embeddings of so many dimensions."""
        return cls.embedding_signs(embedding) | {"picked": Sign()}

    @classmethod
    @torch.no_grad()
    def watch(cls, first: Tensor, second: Tensor, *picks: Picks) -> dict[str, Tensor]:
        """The signs.

        Args:
            first, second: unit vectors [B, D] of two views of the same images.
            picks: of this rank's views, in one part or several.
        """
        return cls.watch_embeddings(first, second) | {"picked": torch.stack([one.picked() for one in picks]).mean()}

    @classmethod
    def brief(cls, row: Row) -> str:
        """How often the right view was picked."""
        return f" ({row['picked']:.0%} picked)"

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Those of all, unless the loss says that images are told apart.

        Without BatchNorm in the head, embeddings share a large mean: they lie close together and still differ.
        """

        def unless_told_apart(one: Symptom) -> Symptom:
            return replace(one, sign=lambda row: None if told_apart(row) else one.sign(row))

        def told_apart(row: Row) -> bool:
            guess = cls.loss_of_guesses(config, row)
            return bool(row.get("loss", guess) < _TOLD_APART * guess)

        return [unless_told_apart(one) for one in super().symptoms(config)]

    @classmethod
    def loss_of_guesses(cls, config: Config, row: Row) -> float:
        """The loss of a row in which no image is told from another."""
        return max(cls.loss_references(config).values())

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How well views find each other, before the panels of all."""
        picks = Panel("Views", {"share that pick their partner": "picked"}, limits=(0, 1.05))
        return [picks, *super().panels(config)]


def images_of_loss(config: Config) -> int:
    """How many images the loss compares: those of a micro-batch, or of a whole batch."""
    train = config.train
    return train.global_batch // (train.accumulate if train.loss_spans == "micro_batch" else 1)
