"""Says in words when the numbers of a clustering method look like collapse; for the console and the report alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from largescale.config import Config, prototype_counts

WARMUP_SHARE = 0.1
"""Share of the run during which every run looks collapsed."""

_UNIFORM_LOSS = (0.99, 1.01)
"""Loss over ln K that uniform predictions have. A loss above is that of predictions that are sure and wrong, as those
of a network that has just begun."""

_UNIFORM_CODES = 0.98
_USED_OF_REACHABLE = 0.05

_SHARPEST = 0.01
"""An epsilon below which assignments are all but hard: a smaller one changes nothing."""
_FEWEST = 20
_QUEUED_BATCHES = 15  # SwAV's for small batches: 3840 samples of 256 (arXiv 2006.09882, appendix A)
_LONGER_FREEZE = "a longer method.freeze_prototypes_steps"


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


class CollapseWatch:
    """Judges the lines of metrics.jsonl, one after the other.

    Args:
        config: of the run; advice starts from its settings.
    """

    def __init__(self, config: Config) -> None:
        self._before: dict[str, Any] = {}
        counts, batch = prototype_counts(config), config.train.global_batch
        epsilon = config.method.epsilon
        # What may still be changed, from where the run is.
        self._sharper = [f"method.epsilon={0.6 * epsilon:.2g}"] if epsilon > _SHARPEST else []
        self._fewer = [f"model.prototypes={max(counts) // 2}"] if max(counts) >= _FEWEST else []
        self._queue = [] if config.method.queue else [f"method.queue={_QUEUED_BATCHES * batch}"]
        self._slower = [f"optim.lr={config.optim.lr / 2:.2g}"]

    def look(self, row: dict[str, Any]) -> str:
        """What looks wrong and what to try, or an empty string.

        Args:
            row: a line of metrics.jsonl. One without `progress` (the share of the run that is done) or another sign
                was written by another version; nothing is said of it.
        """
        before, self._before = self._before, row
        if row.get("progress", 0.0) < WARMUP_SHARE:
            return ""
        # Twice, since a loss that falls from above passes ln K on its way.
        if _is_uniform(row) and _is_uniform(before):
            return (
                f"the loss is {row['loss_over_ln_k']:.1%} of ln K, as if predictions were uniform: this looks like "
                f"collapse. {_try([*self._sharper, _LONGER_FREEZE, *self._slower])}"
            )
        if row.get("assignment_entropy", 0.0) > _UNIFORM_CODES:
            return (
                f"assignments are nearly uniform (entropy {row['assignment_entropy']:.1%} of ln K): samples are not "
                f"told apart. {_try(self._sharper + self._fewer or self._slower)}"
            )
        if row.get("prototype_usage", 1.0) < _USED_OF_REACHABLE * row.get("prototype_usage_reachable", 0.0):
            return (
                f"only {row['prototype_usage']:.2%} of the prototypes are nearest to any sample, where so many images "
                f"could reach {row['prototype_usage_reachable']:.1%}: embeddings gather in few places. "
                f"{_try([*self._fewer, _LONGER_FREEZE, *self._queue])}"
            )
        return ""


def _is_uniform(row: dict[str, Any]) -> bool:
    return _UNIFORM_LOSS[0] < row.get("loss_over_ln_k", 0.0) < _UNIFORM_LOSS[1]


def _try(remedies: list[str]) -> str:
    *first, last = remedies
    return f"Try, in another run.dir, {', '.join(first)}{' or ' if first else ''}{last}"
