"""Retrieval: each test image is a query, the other test images are ranked by cosine; those of its class are relevant.

Average precision and recall as torchmetrics and scikit-learn define them; scikit-learn computes the former, on cosines
as they are, so that hits of negative cosine count. Queries without another image of their class are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.shares import own_rows, total
from shards.ground.errors import InputError

CHOSEN_ON = "nothing"

_QUERIES_AT_A_TIME = 256


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    retrieval_ranks: list[int] = setting(
        [1, 5, 10],
        "Values of k in recall@k: the share of queries with a relevant image among the k nearest.",
        at_least=1,
        min_length=1,
        free=True,
    )


def measure(test: FeatureSet, config: Settings) -> dict[str, Any]:
    """Mean average precision and recall@k over the test images.

    Raises:
        InputError: no two test images are of one class.

    Collectives: every rank must call it; one all-reduce.
    """
    from sklearn.metrics import average_precision_score  # see `protocols`

    unit, labels = normalize(test.features, dim=1), test.labels
    counts = torch.bincount(labels)
    queries = (counts[labels] > 1).nonzero().flatten()
    if len(queries) == 0:
        raise InputError(f"retrieval: no two of the {len(test)} test images are of one class")
    ranks = [k for k in config.retrieval_ranks if k < len(test)] or [1]
    sums = torch.zeros(1 + len(ranks), dtype=torch.float64)
    own = queries[own_rows(len(queries))]
    for some in own.split(_QUERIES_AT_A_TIME):
        cosines = unit[some] @ unit.T
        cosines[torch.arange(len(some)), some] = -2  # behind all others
        relevant = labels[some][:, None] == labels
        nearest = relevant.gather(1, cosines.topk(max(ranks), dim=1).indices)
        for place, k in enumerate(ranks, 1):
            sums[place] += nearest[:, :k].any(1).sum()
        for number, row in enumerate(some.tolist()):
            others = torch.arange(len(test)) != row
            sums[0] += average_precision_score(relevant[number, others].numpy(), cosines[number, others].numpy())
    means = (total(sums) / len(queries)).tolist()
    return {
        "map": means[0],
        **{f"recall_at_{k}": mean for k, mean in zip(ranks, means[1:], strict=True)},
        "num_queries": len(queries),
    }
