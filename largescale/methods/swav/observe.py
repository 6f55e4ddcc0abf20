"""What the numbers of a clustering method mean, and words for those that look like collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

from largescale.methods.method import Row

_UNIFORM_LOSS = (0.99, 1.01)
"""Loss over ln K that uniform predictions have. A loss above is that of predictions that are sure and wrong, as those
of a network that has just begun."""

_UNIFORM_CODES = 0.98
_USED_OF_REACHABLE = 0.05


def uniform_loss(counts: Sequence[int]) -> float:
    """The loss of uniform predictions, ln K, as a mean over heads."""
    return sum(math.log(count) for count in counts) / len(counts)


def reachable_usage(counts: Sequence[int], num_images: int) -> float:
    """Share of the prototypes that so many images are expected to be nearest to if all prototypes are as likely.

    Of n draws from K equally likely ones, K (1 - (1 - 1/K)^n) distinct ones are expected (the classical occupancy
    problem; Feller, An Introduction to Probability Theory, vol. 1, section IV.2). The views of an image are no
    draws of their own: they are meant to be nearest to the same prototype.

    Args:
        counts: prototypes of each head.
        num_images: different images that were looked at.
    """
    return sum(count * (1 - (1 - 1 / count) ** num_images) for count in counts) / sum(counts)


def diagnose(before: Row, row: Row) -> str:
    """What looks wrong in a logged line, given the one before, and what to try; empty where nothing does."""
    # Twice, since a loss that falls from above passes ln K on its way.
    if _is_uniform(row) and _is_uniform(before):
        return (
            f"the loss is {row['loss_over_ln_k']:.1%} of ln K, as if predictions were uniform: this looks like "
            "collapse. Try, in another run.dir, a smaller method.epsilon (0.03), a longer "
            "method.freeze_prototypes_steps, a lower optim.lr"
        )
    if row.get("assignment_entropy", 0.0) > _UNIFORM_CODES:
        return (
            f"assignments are nearly uniform (entropy {row['assignment_entropy']:.1%} of ln K): samples are not "
            "told apart. Try, in another run.dir, a smaller method.epsilon (0.03) or fewer method.prototypes"
        )
    if row.get("prototype_usage", 1.0) < _USED_OF_REACHABLE * row.get("prototype_usage_reachable", 0.0):
        return (
            f"only {row['prototype_usage']:.2%} of the prototypes are nearest to any sample, where so many images "
            f"could reach {row['prototype_usage_reachable']:.1%}: embeddings gather in few places. Try, in "
            "another run.dir, fewer method.prototypes, a longer method.freeze_prototypes_steps or a queue"
        )
    return ""


def _is_uniform(row: Row) -> bool:
    return _UNIFORM_LOSS[0] < row.get("loss_over_ln_k", 0.0) < _UNIFORM_LOSS[1]
