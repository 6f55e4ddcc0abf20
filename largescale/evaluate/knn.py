"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978, section 3.4).

A query's neighbours are the k training samples of largest cosine; each votes for its class with exp(cosine / T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from shards.ground.errors import InputError

_QUERY_CHUNK, _BANK_CHUNK = 1024, 65536


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    knn_neighbours: list[int] = setting(
        [10, 20, 50, 100, 200], "Values of k: how many neighbours vote.", at_least=1, min_length=1, free=True
    )
    knn_temperature: float = setting(
        0.07, "A neighbour's vote weighs exp(cosine / temperature).", at_least=1e-6, at_most=1e6, free=True
    )


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` [N, D] nearest to each query [M, D] by cosine; memory O(chunk), not O(N * M).

    Returns:
        Cosines [M, k] in descending order, and rows of the bank, int64 [M, k].

    Raises:
        InputError: k is larger than the bank.
    """
    if not 1 <= k <= len(bank):
        raise InputError(f"k={k} neighbours: expected 1 to {len(bank)}, the number of samples in the bank")
    cosines, rows = [], []
    for some in queries.split(_QUERY_CHUNK):
        best, place = _nearest_of_chunk(bank, normalize(some, dim=1), k)
        cosines.append(best)
        rows.append(place)
    return torch.cat(cosines), torch.cat(rows)


def _nearest_of_chunk(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    place = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), _BANK_CHUNK):
        part = normalize(bank[start : start + _BANK_CHUNK], dim=1)
        cosines, columns = (queries @ part.T).topk(min(k, len(part)), dim=1)
        merged = torch.cat([best, cosines], dim=1)
        best, kept = merged.topk(min(k, merged.shape[1]), dim=1)
        place = torch.cat([place, columns + start], dim=1).gather(1, kept)
    return best, place


def knn_accuracy(
    train: FeatureSet, test: FeatureSet, *, num_neighbours: Sequence[int], temperature: float
) -> dict[int, float]:
    """Top-1 accuracy, a share, for each number of neighbours.

    Args:
        train: the bank.
        test: the queries.
        num_neighbours: values of k.
        temperature: of the votes.

    Raises:
        InputError: a k larger than the bank, or a temperature that is not above 0.
    """
    if not temperature > 0:
        raise InputError(f"evaluate.knn_temperature={temperature}: expected a number above 0")
    cosines, rows = nearest(train.features, test.features, max(num_neighbours))
    # Relative to the vote of the nearest, which is 1: exp(1 / T) has no float beyond it from T = 0.011 down. What
    # becomes 0 is 1e-300 of that vote.
    votes = torch.exp((cosines - cosines[:, :1]).double() / temperature)
    classes = train.labels[rows]
    accuracy = {}
    for k in num_neighbours:
        tally = votes.new_zeros(len(test), len(train.classes))
        tally.scatter_add_(1, classes[:, :k], votes[:, :k])
        accuracy[k] = float((tally.argmax(1) == test.labels).double().mean())
    return accuracy
