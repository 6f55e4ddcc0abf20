"""Barlow Twins: embeddings of two views correlate in every dimension, and between dimensions not (arXiv 2103.03230).

The loss, as a naive loop, is the docstring of `losses/cross_correlation.py`. Embeddings are standardised and correlated
over the batch of all ranks, and the gradient is that of this batch. The published code leaves the all-reduce of the
correlations out of the gradient, which is then that of one process divided by the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from largescale.config import Config
from largescale.config.setting import setting
from largescale.methods.embedding_method import Named
from largescale.methods.losses.cross_correlation import CrossCorrelation, cross_correlation_terms
from largescale.methods.losses.over_ranks import all_ranks
from largescale.methods.method import Output, Row, Symptom
from largescale.methods.redundancy import RedundancyReduction, RedundancySettings
from largescale.models.heads import mlp

_UNRELATED = 0.95
"""Mean of (1 - c[i, i])^2 over dimensions from which on two views have nothing in common; by chance it is above 1."""


@dataclass
class Settings(RedundancySettings):
    """Barlow Twins' keys under `method`."""

    off_diagonal: float = setting(
        0.0051, "Weight of correlations between different dimensions.", at_least=0, at_most=1e6
    )


class BarlowTwins(RedundancyReduction):
    """Backbone, projection, and the loss of a batch."""

    title = "Barlow Twins"
    reference = "barlow/resnet50_1000ep"
    Settings = Settings
    terms = CrossCorrelation._fields

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, Settings)
        settings = self.config = config.method
        self.projection = mlp([self.num_features, *settings.hidden, settings.embedding], bias=False, last_bias=False)

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch of all ranks. Collectives: those of `cross_correlation`."""
        terms = cross_correlation_terms(*inputs["embeddings"], group=all_ranks())
        return self.output(terms.loss(self.config.off_diagonal), terms, inputs["embeddings"])

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """The loss of views that have nothing in common."""
        assert isinstance(config.method, Settings)
        return {"views unrelated": float(config.method.embedding)}

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Those of all, after correlations that stay near 0, as they do where embeddings hardly vary: the square root's
        constant outweighs their variance then. Chance would make them negative as often as positive.
        """
        assert isinstance(config.method, Settings)
        width = config.method.embedding

        def unrelated(row: Row) -> float | None:
            return row["diagonal"] / width if "diagonal" in row else None

        nothing_common = Symptom(
            "embeddings collapsed",
            sign=unrelated,
            sick=(_UNRELATED, 1 + 1e-6),
            recovery="down",
            seen=lambda row: f"two views have nothing in common ({unrelated(row) or 0:.0%} of the dimensions)",
            remedy=cls.remedy(config),
            in_settings=bool(cls.missing(config)),
            by_rate=True,
        )
        return [nothing_common, *super().symptoms(config)]

    @classmethod
    def missing(cls, config: Config) -> str:
        """What keeps the method from collapse and is switched off."""
        assert isinstance(config.method, Settings)
        if config.method.off_diagonal == 0:
            return "Nothing keeps dimensions apart: set method.off_diagonal=0.0051, in another run.dir"
        return ""
