"""Linear probe on cached features: multinomial logistic regression, its L2 strength chosen on training images.

The features of centre crops are computed once; there is no augmentation, so this is another protocol than
`linear-augmented`, and much faster. Every strength is fitted on nine tenths of the training images and measured on the
others; the best is fitted again on all of them and measured once on the test images. The same choice by regularised
regression: Grill et al., arXiv 2006.07733, appendix D (transfer).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from largescale.config import EvaluateConfig
from largescale.config.setting import setting
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.logistic import fit
from largescale.evaluate.splits import held_out
from shards.ground.errors import InputError

CHOSEN_ON = "a tenth of the training images"

_log = logging.getLogger(__name__)


@dataclass
class Settings(EvaluateConfig):
    """Keys under `evaluate`."""

    linear_cached_strengths: list[float] = setting(
        [0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001],
        "Strengths of the L2 penalty (on the mean loss) that the probe on cached features tries.",
        above=0,
        at_most=1e6,
        min_length=1,
        free=True,
    )
    linear_cached_steps: int = setting(
        200, "Most L-BFGS steps of the probe on cached features.", at_least=1, at_most=10**6, free=True
    )


def measure(train: FeatureSet, test: FeatureSet, config: Settings) -> dict[str, Any]:
    """Top-1 (and top-5) accuracy of the strength that was best on the held-out training images."""
    if len(train) < 2:
        raise InputError(f"linear-cached: {len(train)} labelled training image; needs at least 2")
    strengths, max_steps = config.linear_cached_strengths, config.linear_cached_steps
    strength, sweep = chosen_strength(train, strengths, max_steps, "linear-cached")
    found = fit(train.features, train.labels, len(train.classes), [strength], max_steps=max_steps, said="linear-cached")
    if not found.converged.all():
        _log.info("linear-cached: not converged after evaluate.linear_cached_steps=%d steps", max_steps)
    hits, among_five = (found.hits(test.features, test.labels, top)[0] for top in (1, 5))
    return {
        "top1": float(hits.double().mean()),
        "top5": float(among_five.double().mean()) if len(train.classes) > 5 else None,
        "strength": strength,
        "sweep": {str(one): share for one, share in sweep.items()},
        "steps": found.steps,
        "converged": bool(found.converged.all()),
        "hits": hits.tolist(),
    }


def chosen_strength(
    train: FeatureSet, strengths: list[float], max_steps: int, said: str = ""
) -> tuple[float, dict[float, float]]:
    """The strength that is best on a held-out tenth of the training images, and the accuracy of each there.

    Args:
        train: features and labels.
        strengths: to choose from.
        max_steps: of L-BFGS.
        said: what a bar of the steps calls them; empty shows none.

    Collectives: those of `fit` and `num_right`.
    """
    if len(strengths) == 1:
        return strengths[0], {}
    kept, held = held_out(train.ids)
    found = fit(
        train.features[kept],
        train.labels[kept],
        len(train.classes),
        strengths,
        max_steps=max_steps,
        said=f"{said}, {len(strengths)} strengths" if said else "",
    )
    right: Tensor = found.num_right(train.features[held], train.labels[held])
    sweep = dict(zip(strengths, (right.double() / len(held)).tolist(), strict=True))
    best = max(sweep.values())
    # Of equals the strongest: it is the safer one.
    return max(one for one, share in sweep.items() if share == best), sweep
