"""One number per protocol: the main measure of a result, whatever else its file holds; and numbers as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largescale.checkpoint.folder import newest_first
from largescale.evaluate.results import age, read_results

_MAIN = ("top1", "accuracy", "map", "mAP", "mean_average_precision", "miou", "nmi", "recall_at_1")
"""Names of main measures, for results that do not say theirs: the first that one has counts."""

SETTINGS = ("learning_rate", "strength")
"""Numbers of results that are not measures but settings, chosen on training images."""

_NO_SHARES = (*SETTINGS, "loss")

OWN = "pretrained"
"""The network that was trained, among those that a result compares."""


def main_measure(record: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, float] | None:
    """Name and value (a share) of the number that stands for a network's result; None if there is none, or no share.

    Args:
        record: all of the evaluation, which may say what its `metric` is.
        result: that of a network.
    """
    if not record.get("metric_is_share", True):
        return None
    for name in [record["metric"]] if isinstance(record.get("metric"), str) else _MAIN:
        value = result.get(name)
        if isinstance(value, int | float) and 0 <= value <= 1:
            return name, float(value)
    return None


def is_share(record: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a number of a result is a share, to be shown in percent.

    Args:
        record: all of the evaluation, which says whether its metric is one; so are then its other fractions.
        name: of the number.
        value: the number itself; counts are whole numbers.
    """
    if not isinstance(value, float) or not -1 <= value <= 1 or name in _NO_SHARES:
        return False
    return bool(record.get("metric_is_share", True)) or name.endswith("_share")


def headlines(run_dir: Path) -> dict[str, float]:
    """Percentages of the pretrained network by protocol: results to be trusted, of the newest checkpoint."""
    found, has_checkpoints = {}, bool(newest_first(run_dir / "checkpoints"))
    for protocol, record in read_results(run_dir).newest.items():
        if has_checkpoints and age(record, run_dir):
            continue
        result = record["results"].get(OWN) if isinstance(record.get("results"), dict) else None
        if isinstance(result, dict) and (measure := main_measure(record, result)):
            found[protocol] = 100 * measure[1]
    return found
