"""Low-shot on frozen features: logistic regression on 1% and 10% of the labels, over several seeded splits.

The splits are our own, stratified and seeded, not the published lists of ImageNet: figures are not comparable with
those of these lists.
The L2 strength is chosen on a tenth of the split's own images, so no label outside of the split is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.linear_cached import chosen_strength
from largescale.evaluate.logistic import fit
from largescale.evaluate.splits import stratified
from shards.ground.errors import InputError

CHOSEN_ON = "a tenth of each split's own images"

_MAX_STEPS = 200


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    low_shot_shares: list[float] = setting(
        [0.01, 0.1], "Shares of the training images that are used.", above=0, at_most=1, min_length=1, free=True
    )
    low_shot_splits: int = setting(5, "Seeded splits per share.", at_least=1, at_most=1000, free=True)
    low_shot_strengths: list[float] = setting(
        [1.0, 0.1, 0.01, 0.001],
        "Strengths of the L2 penalty (on the mean loss) that low-shot tries.",
        above=0,
        at_most=1e6,
        min_length=1,
        free=True,
    )


def measure(train: FeatureSet, test: FeatureSet, config: Settings) -> dict[str, Any]:
    """Mean top-1 over the splits at each share; `top1` is that of the smallest share."""
    by_share = {}
    for share in sorted(config.low_shot_shares):
        accuracies, sizes = [], []
        for seed in range(config.low_shot_splits):
            some = part(train, share, seed)
            strength, _ = chosen_strength(some, config.low_shot_strengths, _MAX_STEPS)
            found = fit(some.features, some.labels, len(train.classes), [strength], max_steps=_MAX_STEPS)
            accuracies.append(float(found.num_right(test.features, test.labels)) / len(test))
            sizes.append(len(some))
        by_share[str(share)] = {
            "top1": fmean(accuracies),
            "std": stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "splits": accuracies,
            "num_train": sizes[0],
        }
    smallest = by_share[str(min(config.low_shot_shares))]
    return {"top1": smallest["top1"], "num_train": smallest["num_train"], "by_share": by_share}


def part(train: FeatureSet, share: float, seed: int) -> FeatureSet:
    """The samples of a stratified split.

    Raises:
        InputError: fewer than two.
    """
    rows = stratified(train.ids, train.labels, share, seed)
    if len(rows) < 2:
        raise InputError(f"low-shot: {share:g} of {len(train)} training images are {len(rows)}; needs at least 2")
    return replace(train, features=train.features[rows], labels=train.labels[rows], ids=train.ids[rows])
