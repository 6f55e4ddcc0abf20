"""Clusters against labels: k-means on the test images' features, and how well its clusters are the classes.

Normalised and adjusted mutual information and the adjusted Rand index by scikit-learn (means of entropies are
arithmetic), accuracy by the best matching of clusters to classes (Hungarian algorithm, by SciPy). k-means is fitted on
unit features of the training images, without their labels; the test images go to the nearest centre. A method that
assigns images to something itself (its `exemplars`) is measured by that too, in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from largescale.processes import from_rank_0, rank
from shards.ground.errors import InputError

CHOSEN_ON = "nothing; k-means sees no labels"

_LARGE = 100_000
"""Training images from which on k-means goes by mini-batches."""


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    clusters_count: int = setting(
        0, "Clusters of k-means; 0 takes the number of classes.", at_least=0, at_most=10**6, free=True
    )
    clusters_starts: int = setting(3, "Starts of k-means, of which the best counts.", at_least=1, free=True)


def measure(
    train: FeatureSet, test: FeatureSet, config: Settings, assigned: tuple[str, Tensor] | None = None
) -> dict[str, Any]:
    """NMI, AMI, ARI and accuracy by matching, of the test images; also of what a method assigns them to.

    Args:
        train, test: features and labels.
        config: settings.
        assigned: what the method calls that which it assigns images to, and its number for each test image, int64 [N];
            those results are under `by_` and that name.

    Raises:
        InputError: fewer training images than clusters.

    Collectives: every rank must call it; one broadcast of an object.
    """
    count = config.clusters_count or len(train.classes)
    if len(train) < count:
        raise InputError(f"clusters: {len(train)} training images for {count} clusters; lower evaluate.clusters_count")
    found = _by_k_means(train, test, count, config.clusters_starts) if rank() == 0 else {}
    if assigned is not None and rank() == 0:
        found[f"by_{assigned[0]}"] = agreement(test.labels, assigned[1].numpy())
    return from_rank_0(found)


def _by_k_means(train: FeatureSet, test: FeatureSet, count: int, starts: int) -> dict[str, Any]:
    from sklearn.cluster import KMeans, MiniBatchKMeans  # see `protocols`

    method = KMeans if len(train) < _LARGE else MiniBatchKMeans
    model = method(n_clusters=count, n_init=starts, random_state=0).fit(normalize(train.features, dim=1).numpy())
    return agreement(test.labels, model.predict(normalize(test.features, dim=1).numpy()))


def agreement(labels: Tensor, clusters: np.ndarray) -> dict[str, Any]:
    """How well clusters [N] are the classes of labels [N]: shares, and the number of clusters that are not empty."""
    from sklearn import metrics  # see `protocols`

    truth = labels.numpy()
    return {
        "nmi": float(metrics.normalized_mutual_info_score(truth, clusters)),
        "ami": float(metrics.adjusted_mutual_info_score(truth, clusters)),
        "ari": float(metrics.adjusted_rand_score(truth, clusters)),
        "matched": matched_share(truth, clusters),
        "num_clusters": len(np.unique(clusters)),
    }


def purity(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of samples that are of the class which most samples of their cluster are of."""
    pairs, counts = np.unique(np.stack((clusters, labels)), axis=1, return_counts=True)
    largest = np.zeros(int(clusters.max()) + 1, np.int64)
    np.maximum.at(largest, pairs[0], counts)
    return float(largest.sum() / len(labels))


def matched_share(labels: np.ndarray, clusters: np.ndarray) -> float:
    """Share of samples that are of the class their cluster stands for, in the best matching of one class each."""
    from scipy.optimize import linear_sum_assignment  # see `protocols`

    table = np.zeros((int(labels.max()) + 1, int(clusters.max()) + 1), np.int64)
    np.add.at(table, (labels, clusters), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(labels))
