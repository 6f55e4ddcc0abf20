"""Soft nearest neighbours among a few labelled images: what PAWS reports without fine-tuning (arXiv 2104.13963).

Every labelled image of a split votes for its class with exp(cosine / T), and the class with most of the vote is taken;
smoothed labels would change nothing. Cosines are those of the method's embeddings, by its head, where it has one, as
published, and of features elsewhere. Splits are those of `low_shot`. A run that was trained with labels is measured by
these first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.shares import own_rows, total
from largescale.evaluate.splits import stratified

CHOSEN_ON = "nothing; the temperature is given"

_NUMBERS = 2**24
"""Cosines that are held at a time."""

Pair = tuple[FeatureSet, FeatureSet]
"""Training and test images."""

Splits = dict[float, list[Tensor]]
"""Rows of the training images of each seeded split, int64, by its share."""


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    support_neighbours_shares: list[float] = setting(
        [0.01, 0.1], "Shares of the training images that vote.", above=0, at_most=1, min_length=1, free=True
    )
    support_neighbours_splits: int = setting(5, "Seeded splits per share.", at_least=1, at_most=1000, free=True)
    support_neighbours_temperature: float = setting(
        0.1, "A labelled image's vote weighs exp(cosine / temperature).", at_least=1e-6, at_most=1e6, free=True
    )


def splits_of(train: FeatureSet, config: Settings) -> Splits:
    """The splits that the settings ask for; features are not looked at, so all networks share them."""
    numbers, shares = range(config.support_neighbours_splits), sorted(config.support_neighbours_shares)
    return {share: [stratified(train.ids, train.labels, share, seed) for seed in numbers] for share in shares}


def measure(
    train: FeatureSet,
    test: FeatureSet,
    config: Settings,
    embedded: Pair | None = None,
    own: Tensor | None = None,
    splits: Splits | None = None,
) -> dict[str, Any]:
    """Top-1 by the run's own labels if it has some, else the mean over the splits of the smallest share.

    Args:
        train, test: features and labels.
        config: settings.
        embedded: the same images by the method's head, if it has one.
        own: rows of the training images whose labels the run was trained with, int64; None for a run without labels.
        splits: those of `splits_of`; None makes them.

    Collectives: every rank must call it; one all-reduce per split.
    """
    shown, by_share, temperature = embedded or (train, test), {}, config.support_neighbours_temperature
    for share, rows_of in (splits_of(train, config) if splits is None else splits).items():
        accuracies = [_share(hits_by(rows, shown, temperature)) for rows in rows_of]
        by_share[str(share)] = {
            "top1": fmean(accuracies),
            "std": stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "splits": accuracies,
            "num_train": len(rows_of[0]),
        }
    smallest = by_share[str(min(config.support_neighbours_shares))]
    found: dict[str, Any] = {"top1": smallest["top1"], "num_train": smallest["num_train"], "by_share": by_share}
    if own is not None:
        hits = hits_by(own, shown, temperature)
        found |= {"top1": _share(hits), "num_train": len(own), "num_own_labels": len(own), "hits": hits.tolist()}
        if embedded is not None:
            found["top1_of_features"] = _share(hits_by(own, (train, test), temperature))
    return found


@torch.no_grad()
def hits_by(rows: Tensor, images: Pair, temperature: float) -> Tensor:
    """Which test images get their class from these rows of the training images: bool [N].

    Collectives: every rank must call it; one all-reduce.
    """
    train, test = images
    mine, hits = own_rows(len(test)), torch.zeros(len(test), dtype=torch.bool)
    bank, labels = normalize(train.features[rows].double(), dim=1), train.labels[rows]
    for some in mine.split(max(1, _NUMBERS // max(1, len(rows)))):
        cosines = normalize(test.features[some].double(), dim=1) @ bank.T
        # Relative to the nearest: exp(1 / T) has no float beyond it from T = 0.0014 down.
        votes = ((cosines - cosines.amax(1, keepdim=True)) / temperature).exp()
        tally = votes.new_zeros(len(some), len(train.classes)).index_add_(1, labels, votes)
        hits[some] = tally.argmax(1) == test.labels[some]
    return total(hits) > 0


def through(head: torch.nn.Module, images: FeatureSet, device: torch.device) -> FeatureSet:
    """Images by what a head makes of their features."""
    with torch.no_grad():
        parts = [head(some.to(device)).float().cpu() for some in images.features.split(4096)]
    return replace(images, features=torch.cat(parts))


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
