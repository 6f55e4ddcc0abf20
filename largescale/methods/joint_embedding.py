"""Shared by methods that bring views of an image together in one space: what to watch, and what it means.

Four signs of unit embeddings z tell whether they have collapsed, to one point or to a line:

- `embedding_std`: the standard deviation of a dimension, averaged, times sqrt(D): 1 if they are spread over the whole
  sphere, 0 if all are equal (SimSiam, arXiv 2011.10566, section 4.1).
- `effective_rank`: how many directions they use, 1 / E (z_i . z_j)^2 over pairs of different images: the participation
  ratio of the second moment's eigenvalues, D for a sphere, 1 for a point or a line. From pairs, it does not depend on
  the size of the batch.
- `agreement`: the mean cosine of two views of an image; near 1 from the start, the task is too easy.
- `agreement_of_others`: that of views of two images, as the loss compares them. If the former is no higher, nothing is
  learnt of images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import Config
from largescale.methods.embedding_method import EmbeddingMethod
from largescale.methods.method import Panel, Row, Sign, Symptom

_ONE_PLACE = 0.05
"""Spread of unit embeddings below which they all point the same way."""
_WIDER = "a wider head (method.hidden, method.embedding)"
_ONE_LINE = 1.7
"""Effective rank below which they lie on a line, or nearly; runs that go well have passed through 1.88."""


def unit(z: Tensor) -> Tensor:
    """Rows [..., D] of length 1, in float32 (float64 for float64 ones) under any autocast."""
    with torch.autocast(z.device.type, enabled=False):
        return normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)


class JointEmbedding(EmbeddingMethod):
    """A method with the signs above; it calls `watch_embeddings` in its loss, and merges `embedding_signs`."""

    @staticmethod
    def embedding_signs(embedding: int) -> dict[str, Sign]:
        """Declarations of what `watch_embeddings` returns, for embeddings of so many dimensions."""
        moment = Sign(shape=(embedding,))
        return {
            "mean_embedding": moment,
            "mean_square": moment,
            "pair_square": Sign(),
            "agreement": Sign(),
            "agreement_of_others": Sign(),
        }

    @staticmethod
    @torch.no_grad()
    def watch_embeddings(first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """The signs of this rank's embeddings. Those of pairs are 0 if there is a single image.

        Args:
            first, second: unit vectors [B, D] of two views of the same images, as the loss compares them.
        """
        first, second = first.detach(), second.detach()
        pairs = len(first) * (len(first) - 1)
        similarity = first @ first.T
        # Without the images' pairs with themselves.
        square = similarity.square().sum() - similarity.diagonal().square().sum()
        own = (first * second).sum()
        return {
            "mean_embedding": first.mean(0),
            "mean_square": first.square().mean(0),
            "pair_square": square / max(pairs, 1),
            "agreement": own / len(first),
            "agreement_of_others": (first.sum(0) @ second.sum(0) - own) / max(pairs, 1),
        }

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """Signs that are numbers, and what follows from the moments."""
        own = {name: float(value) for name, value in signs.items() if value.numel() == 1 and name != "pair_square"}
        mean, square = signs["mean_embedding"], signs["mean_square"]
        variance = (square - mean.square()).clamp_min(0)
        if (pair_square := float(signs["pair_square"])) > 0:
            own["effective_rank"] = 1 / max(pair_square, 1e-6)
        return own | {
            "embedding_spread": max(0.0, 1 - float(mean.square().sum())),
            "embedding_std": float(variance.sqrt().mean()) * len(mean) ** 0.5,
        }

    @classmethod
    def brief(cls, row: Row) -> str:
        """How far apart embeddings are."""
        if "embedding_std" not in row:
            return ""
        used = f", rank {row['effective_rank']:.1f}" if "effective_rank" in row else ""
        return f" (std {row['embedding_std']:.2f}{used})"

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """All embeddings in one place, or on one line."""
        return [
            Symptom(
                "embeddings collapsed",
                sign=lambda row: row.get("embedding_spread"),
                sick=(0, _ONE_PLACE),
                recovery="up",
                seen=lambda row: f"embeddings are nearly equal (spread {row['embedding_spread']:.2%})",
                remedy=cls.remedy(config),
                in_settings=bool(cls.missing(config)),
                by_rate=True,
            ),
            Symptom(
                "features of low rank",
                sign=lambda row: row.get("effective_rank"),
                sick=(0, _ONE_LINE),
                recovery="up",
                seen=lambda row: f"embeddings lie on a line (effective rank {row['effective_rank']:.2f})",
                remedy=cls.missing(config)
                or f"Try, in another run.dir, {_WIDER}, optim.lr={config.optim.lr / 2:.2g} or a longer "
                "optim.warmup_epochs",
                in_settings=bool(cls.missing(config)),
                by_rate=True,
                besides_rate=_WIDER,
            ),
        ]

    @classmethod
    def missing(cls, config: Config) -> str:
        """What keeps the method from collapse but is switched off, and how to switch it on; or empty."""
        return ""

    @classmethod
    def remedy(cls, config: Config) -> str:
        """What to try against collapse."""
        slower = f"Try, in another run.dir, optim.lr={config.optim.lr / 2:.2g} or a longer optim.warmup_epochs"
        return cls.missing(config) or slower

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """How far apart embeddings are, how close two views, and how many directions are used."""
        return [
            Panel(
                "Embeddings",
                {
                    "standard deviation (1: whole sphere)": "embedding_std",
                    "spread": "embedding_spread",
                    "agreement of two views": "agreement",
                },
                limits=(0, 1.05),
            ),
            Panel("Directions used", {"effective rank": "effective_rank"}),
        ]
