"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv 1805.01978, section 3.4).

A query's neighbours are the k training samples of largest cosine; each votes for its class with exp(cosine / T).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.shares import own_rows, total
from shards.ground.errors import InputError

HEADLINE_K = 20
"""The number of neighbours whose accuracy is quoted (a k chosen on the test images would flatter)."""

CHOSEN_ON = "nothing; k and temperature are given"

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From a bank, queries and k to cosines and rows, as of `nearest`."""

_QUERY_CHUNK, _BANK_CHUNK = 1024, 65536

_log = logging.getLogger(__name__)


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    knn_neighbours: list[int] = setting(
        [10, 20, 50, 100, 200], "Values of k: how many neighbours vote.", at_least=1, min_length=1, free=True
    )
    knn_temperature: float = setting(
        0.07, "A neighbour's vote weighs exp(cosine / temperature).", at_least=1e-6, at_most=1e6, free=True
    )
    knn_temperatures: list[float] = setting(
        [0.04, 0.07, 0.1, 0.2],
        "Other temperatures whose accuracy is reported beside that of evaluate.knn_temperature.",
        at_least=1e-6,
        at_most=1e6,
        free=True,
    )
    knn_search: str = setting(
        "torch",
        "What finds neighbours, exactly: torch (on a GPU if there is one), or faiss (on CPUs; pip install faiss-cpu).",
        one_of=("torch", "faiss"),
        free=True,
    )


def measure(train: FeatureSet, test: FeatureSet, config: Settings) -> dict[str, Any]:
    """Top-1 accuracy at k = 20, and at every other k and temperature of the settings."""
    headline = min(HEADLINE_K, len(train))
    possible = [k for k in config.knn_neighbours if k <= len(train)]
    if len(possible) < len(config.knn_neighbours):
        _log.info(
            "evaluate.knn_neighbours=%s: the bank has %d images, larger k are left out",
            config.knn_neighbours,
            len(train),
        )
    neighbours = sorted({headline, *possible})
    temperatures = list(dict.fromkeys([config.knn_temperature, *config.knn_temperatures]))
    search = nearest if config.knn_search == "torch" else nearest_by_faiss
    hits = hits_by(train, test, num_neighbours=neighbours, temperatures=temperatures, search=search)
    found = _shares(hits, neighbours, temperatures)
    by_k = {str(k): share for k, share in found[config.knn_temperature].items()}
    return {
        "top1": by_k[str(headline)],
        "num_neighbours": headline,
        "top1_by_k": by_k,
        "top1_by_temperature": {str(temperature): by_k[headline] for temperature, by_k in found.items()},
        "doubts": _small_classes(train, headline),
        "hits": hits[0, neighbours.index(headline)].tolist(),
    }


def _small_classes(train: FeatureSet, k: int) -> list[str]:
    """What to say where the smallest class cannot fill the neighbours of its own images."""
    counts = torch.bincount(train.labels)
    fewest = int(counts[counts > 0].min())
    if fewest >= k:
        return []
    return [
        f"the smallest class has {fewest} labelled training images, fewer than the k = {k} neighbours that vote: "
        f"its images can be outvoted by others; check smaller k"
    ]


@torch.no_grad()
def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` [N, D] nearest to each query [M, D] by cosine; memory O(chunk), not O(N * M).

    Computed on the GPU if there is one.

    Returns:
        Cosines [M, k] in descending order, and rows of the bank, int64 [M, k].

    Raises:
        InputError: k is larger than the bank.
    """
    if not 1 <= k <= len(bank):
        raise InputError(f"k={k} neighbours: expected 1 to {len(bank)}, the number of samples in the bank")
    best = [
        (queries.new_empty(len(some), 0), torch.empty(len(some), 0, dtype=torch.int64)) for some in _chunks(queries)
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for start in range(0, len(bank), _BANK_CHUNK):  # outside: the bank, which is large, goes to the device once
        part = normalize(bank[start : start + _BANK_CHUNK].to(device), dim=1)
        for number, some in enumerate(_chunks(queries)):
            best[number] = _merged(best[number], part, start, normalize(some.to(device), dim=1), k)
    return torch.cat([cosines for cosines, _ in best]), torch.cat([rows for _, rows in best])


def nearest_by_faiss(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `nearest` finds, by faiss's flat index, on all CPUs.

    Raises:
        InputError: k is larger than the bank, or faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError("evaluate.knn_search=faiss: faiss is not installed; pip install faiss-cpu") from error
    if not 1 <= k <= len(bank):
        raise InputError(f"k={k} neighbours: expected 1 to {len(bank)}, the number of samples in the bank")
    index = faiss.IndexFlatIP(bank.shape[1])
    for part in bank.split(_BANK_CHUNK):
        index.add(normalize(part.float(), dim=1).numpy())
    cosines, rows = index.search(normalize(queries.float(), dim=1).numpy(), k)
    return torch.from_numpy(cosines), torch.from_numpy(rows)


def _chunks(queries: Tensor) -> tuple[Tensor, ...]:
    return queries.split(_QUERY_CHUNK)


def _merged(best: tuple[Tensor, Tensor], part: Tensor, start: int, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest among those known and those in a part of the bank, whose first row is `start`; on the host."""
    found, columns = (queries @ part.T).topk(min(k, len(part)), dim=1)
    cosines = torch.cat([best[0], found.cpu()], dim=1)
    rows = torch.cat([best[1], columns.cpu() + start], dim=1)
    cosines, kept = cosines.topk(min(k, cosines.shape[1]), dim=1)
    return cosines, rows.gather(1, kept)


def knn_accuracy(
    train: FeatureSet, test: FeatureSet, *, num_neighbours: Sequence[int], temperature: float
) -> dict[int, float]:
    """`knn_accuracies` at one temperature."""
    return knn_accuracies(train, test, num_neighbours=num_neighbours, temperatures=[temperature])[temperature]


def knn_accuracies(
    train: FeatureSet, test: FeatureSet, *, num_neighbours: Sequence[int], temperatures: Sequence[float]
) -> dict[float, dict[int, float]]:
    """Top-1 accuracy, a share, by temperature and number of neighbours; arguments and errors as of `hits_by`."""
    hits = hits_by(train, test, num_neighbours=num_neighbours, temperatures=temperatures)
    return _shares(hits, num_neighbours, temperatures)


def _shares(hits: Tensor, ks: Sequence[int], temperatures: Sequence[float]) -> dict[float, dict[int, float]]:
    shares = (hits.sum(2).double() / hits.shape[2]).tolist()
    return {one: dict(zip(ks, row, strict=True)) for one, row in zip(temperatures, shares, strict=True)}


def hits_by(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_neighbours: Sequence[int],
    temperatures: Sequence[float],
    search: Search = nearest,
) -> Tensor:
    """Which queries get their class, by temperature and number of neighbours: bool [T, K, N].

    Args:
        train: the bank.
        test: the queries, which ranks share.
        num_neighbours: values of k.
        temperatures: of the votes.
        search: what finds neighbours.

    Raises:
        InputError: a k larger than the bank, or a temperature that is not above 0.

    Collectives: every rank must call it; one all-reduce.
    """
    for temperature in temperatures:
        if not temperature > 0:
            raise InputError(f"evaluate.knn_temperature={temperature}: expected a number above 0")
    own = own_rows(len(test))
    cosines, rows = search(train.features, test.features[own], max(num_neighbours))
    classes, labels = train.labels[rows], test.labels[own]
    hits = torch.zeros(len(temperatures), len(num_neighbours), len(test), dtype=torch.bool)
    for number, temperature in enumerate(temperatures):
        # Relative to the vote of the nearest, which is 1: exp(1 / T) has no float beyond it from T = 0.011 down. What
        # becomes 0 is 1e-300 of that vote.
        votes = torch.exp((cosines - cosines[:, :1]).double() / temperature)
        for place, k in enumerate(num_neighbours):
            hits[number, place, own] = are_right(votes[:, :k], classes[:, :k], labels, len(train.classes))
    return total(hits) > 0


def are_right(votes: Tensor, classes: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Whether the class of each query gets most of its votes [M, k]: bool [M]."""
    right = torch.zeros(len(votes), dtype=torch.bool)
    for some in torch.arange(len(votes)).split(_QUERY_CHUNK):  # a tally has a column per class
        tally = votes.new_zeros(len(some), num_classes).scatter_add_(1, classes[some], votes[some])
        right[some] = tally.argmax(1) == labels[some]
    return right
