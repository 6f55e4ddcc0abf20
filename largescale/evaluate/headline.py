"""One number per protocol: the main measure of a result, whatever else its file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largescale.evaluate.results import read_results

_MAIN = ("top1", "accuracy", "map", "mAP", "mean_average_precision", "miou", "nmi", "recall_at_1")
"""Names of main measures, for results that do not say theirs: the first that one has counts."""

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


def headlines(run_dir: Path) -> dict[str, float]:
    """Percentages of the pretrained network by protocol, of the newest results that can be trusted."""
    found = {}
    for protocol, record in read_results(run_dir).newest.items():
        result = record["results"].get(OWN) if isinstance(record.get("results"), dict) else None
        if isinstance(result, dict) and (measure := main_measure(record, result)):
            found[protocol] = 100 * measure[1]
    return found
