"""What `largescale evaluate` prints: a line per network of a run, or a line per run where there are several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from largescale.evaluate.features import NETWORKS
from largescale.evaluate.headline import is_share
from largescale.evaluate.protocols import PROTOCOLS
from largescale.evaluate.results import Record

_KINDS = ("stage", "classifier")
"""What a metric may be given by."""

_DIRECTION = "_by_direction"
_NAMES = NETWORKS | {"chance": "chance", "centre": "centre of the image"}


def table(places: Sequence[str | Path], records: Sequence[Record]) -> str:
    """The results of one protocol.

    Args:
        places: what was measured, as the user named it.
        records: the result of each.
    """
    return _of_one(records[0]) if len(records) == 1 else _of_several(list(map(str, places)), records)


def _of_one(record: Record) -> str:
    title = record["metric_title"]
    lines = [
        f"{record['protocol']:>7}  {_NAMES[network]:<24} {title} {_value(record, network)}"
        for network in record["results"]
    ]
    for network, result in record["results"].items():
        for what, own in result.items():  # the same measured another way
            if isinstance(own, dict) and record["metric"] in own:
                name = f"{_NAMES[network]}, {what.removeprefix('by_')}s"
                lines.append(f"{record['protocol']:>7}  {name:<24} {record['metric']} {own[record['metric']]:6.2%}")
    return "\n".join([*lines, *_by_part(record)])


def _by_part(record: Record) -> list[str]:
    """A line per stage of the network, classifier, share of the labels, or measure, and a column per network, where a
    protocol has these.
    """
    found = {name: _parts(record, result) for name, result in record["results"].items()}
    results = {name: parts for name, parts in found.items() if parts}
    if not results:
        return []
    rows = [["", *(_NAMES[name] for name in results)]]
    for part in dict.fromkeys(part for parts in results.values() for part in parts):
        rows.append([part, *(_text(record, part, parts.get(part)) for parts in results.values())])
    return _aligned(rows)


def _text(record: Record, part: str, value: float | None) -> str:
    if value is None:  # not defined of these features
        return "-"
    return f"{value:.2%}" if is_share(record, part.replace(" ", "_"), value) else f"{value:.4g}"


def _parts(record: Record, result: Mapping[str, Any]) -> dict[str, float]:
    """The metric by one of `_KINDS`, or by share of the labels; all measures where the metric is but one of
    them that are no shares, or are given by direction; empty where there is one alone.
    """
    metric = record["metric"]
    if not record.get("metric_is_share", True):
        return {name.replace("_", " "): value for name, value in result.items() if isinstance(value, float)}
    found = {
        f"{name.removesuffix(_DIRECTION).replace('_', ' ')}, {direction}": value
        for name, values in result.items()
        if name.endswith(_DIRECTION)
        for direction, value in values.items()
    }
    if found:
        return found
    parts: list[dict[str, float]] = [result.get(f"{metric}_by_{kind}", {}) for kind in _KINDS]
    return next(filter(None, parts), {}) or {
        f"{100 * float(share):g}% of the labels": one[metric] for share, one in result.get("by_share", {}).items()
    }


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _of_several(places: list[str], records: Sequence[Record]) -> str:
    networks = list(dict.fromkeys(name for record in records for name in record["results"]))
    tests = [record["made_from"]["test_shards"]["name"] for record in records]
    same = len({record["made_from"]["test_shards"]["fingerprint"] for record in records}) == 1
    head = ["run", *([] if same else ["images"]), "step", *(_NAMES[name] for name in networks)]
    rows = [
        [
            place,
            *([] if same else [test]),
            "-" if record["checkpoint_step"] is None else str(record["checkpoint_step"]),
            *(_value(record, name) if name in record["results"] else "-" for name in networks),
        ]
        for place, test, record in zip(places, tests, records, strict=True)
    ]
    protocol = PROTOCOLS.get(records[0]["protocol"])
    kind = "training" if protocol is not None and protocol.on_training_images else "test"
    on = (
        f"{records[0]['num_test']:,} {kind} images of {tests[0]}"
        if same
        else f"not the same {kind} images in every row"
    )
    return "\n".join([f"{records[0]['protocol']}, {records[0]['metric_title']}, {on}", *_aligned([head, *rows])])


def _value(record: Record, network: str) -> str:
    """The metric, in percent if it is a share, with half of its confidence interval where there is one."""
    result = record["results"][network]
    if record["metric"] not in result:  # not defined of these features
        return "-"
    value = result[record["metric"]]
    text = f"{value:6.2%}" if record.get("metric_is_share", True) else f"{value:6.1f}"
    if "interval" in result:
        low, high = result["interval"]
        text += f" ± {50 * (high - low):.2f}"
    return text
