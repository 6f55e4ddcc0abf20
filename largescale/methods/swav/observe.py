"""What the numbers of a clustering method mean, and warnings for those that look like collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

from largescale.config import Config
from largescale.methods.method import Row
from largescale.methods.swav.settings import Settings

_UNIFORM_LOSS = (0.99, 1.01)
"""Loss over ln K of uniform predictions. A higher loss means predictions that are sure and wrong, as in a network that
has just started."""

_UNIFORM_CODES = 0.98
_USED_OF_REACHABLE = 0.05

_SHARPEST = 0.01
"""An epsilon below which assignments are all but hard: a smaller one changes nothing."""
_FEWEST = 20
_QUEUED_BATCHES = 15  # for small batches: 3840 samples of 256 (arXiv 2006.09882, appendix A)
_LONGER_FREEZE = "a longer method.freeze_prototypes_steps"


def uniform_loss(counts: Sequence[int]) -> float:
    """The loss of uniform predictions, ln K, as a mean over heads."""
    return sum(math.log(count) for count in counts) / len(counts)


def reachable_usage(counts: Sequence[int], num_images: int) -> float:
    """Share of the prototypes expected to be nearest to any of `num_images` images if all are equally likely.

    Of n draws from K equally likely ones, K (1 - (1 - 1/K)^n) distinct ones are expected (the classical occupancy
    problem; Feller, An Introduction to Probability Theory, vol. 1, section IV.2). The views of an image are not
    separate draws: they are meant to be nearest to the same prototype.

    Args:
        counts: prototypes of each head.
        num_images: different images that were looked at.
    """
    return sum(count * (1 - (1 - 1 / count) ** num_images) for count in counts) / sum(counts)


def diagnose(config: Config, settings: Settings, before: Row, row: Row) -> str:
    """What looks wrong in a logged line, given the one before, and what to try; empty if nothing does."""
    most = max(settings.counts)
    # What can still be changed, starting from the run's settings.
    sharper = [f"method.epsilon={0.6 * settings.epsilon:.2g}"] if settings.epsilon > _SHARPEST else []
    fewer = [f"method.prototypes={most // 2}"] if most >= _FEWEST else []
    queue = [] if settings.queue else [f"method.queue={_QUEUED_BATCHES * config.train.global_batch}"]
    slower = [f"optim.lr={config.optim.lr / 2:.2g}"]
    # Twice in a row, since a loss that falls from above passes ln K on its way.
    if _is_uniform(row) and _is_uniform(before):
        return (
            f"the loss is {row['loss_over_ln_k']:.1%} of ln K, as if predictions were uniform: this looks like "
            f"collapse. {_try([*sharper, _LONGER_FREEZE, *slower])}"
        )
    if row.get("assignment_entropy", 0.0) > _UNIFORM_CODES:
        return (
            f"assignments are nearly uniform (entropy {row['assignment_entropy']:.1%} of ln K): samples are not "
            f"told apart. {_try(sharper + fewer or slower)}"
        )
    if row.get("prototype_usage", 1.0) < _USED_OF_REACHABLE * row.get("prototype_usage_reachable", 0.0):
        return (
            f"only {row['prototype_usage']:.2%} of the prototypes are nearest to any sample, where this many images "
            f"could reach {row['prototype_usage_reachable']:.1%}: embeddings gather in few places. "
            f"{_try([*fewer, _LONGER_FREEZE, *queue])}"
        )
    return ""


def _is_uniform(row: Row) -> bool:
    return _UNIFORM_LOSS[0] < row.get("loss_over_ln_k", 0.0) < _UNIFORM_LOSS[1]


def _try(remedies: list[str]) -> str:
    *first, last = remedies
    return f"Try, in another run.dir, {', '.join(first)}{' or ' if first else ''}{last}"
