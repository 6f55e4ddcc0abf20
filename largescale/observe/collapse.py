"""Says in words when the numbers of a clustering method look like collapse."""

from __future__ import annotations

from dataclasses import dataclass

WARMUP_SHARE = 0.1
"""Share of the run during which every run looks collapsed."""


@dataclass(frozen=True)
class Signs:
    """One logged step, each value in units where 1 is the extreme.

    Attributes:
        loss_over_ln_k: 1 when predictions are no better than uniform.
        assignment_entropy: 1 when every sample is assigned to all prototypes alike.
        prototype_usage: share of prototypes that were nearest to at least one sample.
    """

    loss_over_ln_k: float
    assignment_entropy: float
    prototype_usage: float


def warning(signs: Signs, progress: float) -> str:
    """What looks wrong and what to try, or an empty string.

    Args:
        signs: the numbers of a logged step.
        progress: share of the run that is done.
    """
    if progress < WARMUP_SHARE:
        return ""
    if signs.loss_over_ln_k > 0.99:
        return (
            f"the loss is {signs.loss_over_ln_k:.1%} of ln K, as if predictions were uniform: this looks like "
            "collapse. Try a smaller method.epsilon (0.03), a longer method.freeze_prototypes_steps, a lower optim.lr"
        )
    if signs.assignment_entropy > 0.98:
        return (
            f"assignments are nearly uniform (entropy {signs.assignment_entropy:.1%} of ln K): samples are not told "
            "apart. Try a smaller method.epsilon (0.03) or fewer model.prototypes"
        )
    if signs.prototype_usage < 0.05:
        return (
            f"only {signs.prototype_usage:.1%} of the prototypes are nearest to any sample: embeddings gather in few "
            "places. Try fewer model.prototypes, a longer method.freeze_prototypes_steps or a queue"
        )
    return ""
