"""The protocols of `largescale evaluate`, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from largescale.config import EvaluateConfig
from largescale.evaluate import knn, linear
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.knn import knn_accuracy
from largescale.evaluate.linear import linear_probe

KNN_HEADLINE_K = 20
"""The number of neighbours whose accuracy is quoted (a k chosen on the test images would flatter)."""

_log = logging.getLogger(__name__)


def _knn(train: FeatureSet, test: FeatureSet, config: knn.Settings) -> dict[str, Any]:
    headline = min(KNN_HEADLINE_K, len(train))
    possible = [k for k in config.knn_neighbours if k <= len(train)]
    if len(possible) < len(config.knn_neighbours):
        _log.info(
            "evaluate.knn_neighbours=%s: the bank has %d images, larger k are left out",
            config.knn_neighbours,
            len(train),
        )
    neighbours = sorted({headline, *possible})
    by_k = knn_accuracy(train, test, num_neighbours=neighbours, temperature=config.knn_temperature)
    return {"top1": by_k[headline], "num_neighbours": headline, "top1_by_k": {str(k): v for k, v in by_k.items()}}


def _linear(train: FeatureSet, test: FeatureSet, config: linear.Settings) -> dict[str, Any]:
    result = linear_probe(
        train,
        test,
        learning_rates=config.linear_rates,
        epochs=config.linear_epochs,
        batch_size=config.linear_batch,
        weight_decay=config.linear_weight_decay,
        seed=0,
    )
    return {
        "top1": result.top1,
        "top5": result.top5,
        "learning_rate": result.learning_rate,
        "sweep": {str(rate): accuracy for rate, accuracy in result.sweep.items()},
    }


@dataclass(frozen=True)
class Protocol:
    """One entry of `PROTOCOLS`.

    Attributes:
        measure: what the features of training and test images are worth; needs its own `Settings`.
        Settings: the keys under `evaluate` that it has beside those of all.
    """

    measure: Callable[[FeatureSet, FeatureSet, Any], dict[str, Any]]
    Settings: type[EvaluateConfig]


PROTOCOLS = {"knn": Protocol(_knn, knn.Settings), "linear": Protocol(_linear, linear.Settings)}
