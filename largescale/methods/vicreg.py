"""VICReg: views alike, each dimension of the embeddings varies, and no two vary together (arXiv 2105.04906).

The loss, as a naive loop and with what the paper has otherwise, is the docstring of `losses/variance_covariance.py`.
Variances and covariances are those of the batch of all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from largescale.config import Config
from largescale.config.setting import setting
from largescale.methods.embedding_method import Named
from largescale.methods.losses.over_ranks import all_ranks
from largescale.methods.losses.variance_covariance import VarianceCovariance, variance_covariance_terms
from largescale.methods.method import Output, Symptom
from largescale.methods.redundancy import RedundancyReduction, RedundancySettings
from largescale.models.heads import mlp

_STILL = 0.95
"""Variance term from which on dimensions hardly vary: standard deviations of a twentieth."""


def _weight(default: float, help: str) -> Any:
    return setting(default, help, at_least=0, at_most=1e6)


@dataclass
class Settings(RedundancySettings):
    """VICReg's keys under `method`."""

    invariance: float = _weight(25.0, "Weight of the difference between two views.")
    variance: float = _weight(25.0, "Weight of the lack of variance of dimensions; with 0, embeddings collapse.")
    covariance: float = _weight(1.0, "Weight of covariances of different dimensions.")


class VICReg(RedundancyReduction):
    """Backbone, projection, and the loss of a batch."""

    title = "VICReg"
    reference = "vicreg/resnet50_1000ep"
    Settings = Settings
    terms = VarianceCovariance._fields

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, Settings)
        settings = self.config = config.method
        self.projection = mlp([self.num_features, *settings.hidden, settings.embedding], bias=True, last_bias=False)

    def loss(self, inputs: Named, ids: Tensor, step: int) -> Output:
        """The loss of a batch of all ranks. Collectives: those of `variance_covariance`."""
        terms, weights = variance_covariance_terms(*inputs["embeddings"], group=all_ranks()), self.config
        loss = terms.loss(weights.invariance, weights.variance, weights.covariance)
        return self.output(loss, terms, inputs["embeddings"])

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """Those of all, after dimensions that hardly vary: embeddings are nearly equal then, though their directions
        need not be where all are close to 0.
        """
        still = Symptom(
            "embeddings collapsed",
            sign=lambda row: row.get("variance"),
            sick=(_STILL, math.inf),
            recovery="down",
            seen=lambda row: f"dimensions of the embeddings hardly vary (standard deviation {1 - row['variance']:.2g})",
            remedy=cls.remedy(config),
            in_settings=bool(cls.missing(config)),
            by_rate=True,
        )
        return [still, *super().symptoms(config)]

    @classmethod
    def missing(cls, config: Config) -> str:
        """What keeps the method from collapse and is switched off."""
        assert isinstance(config.method, Settings)
        if config.method.variance == 0:
            return "Nothing keeps embeddings apart: set method.variance=25, in another run.dir"
        return ""
