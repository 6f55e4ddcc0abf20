"""Results of evaluations as a report compares them: one number per run, protocol and network, with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import binomtest

from largescale.evaluate.headline import OWN, main_measure
from largescale.evaluate.results import Record
from largescale.report.reported_run import ReportedRun

NETWORKS = {OWN: "pretrained", "untrained": "untrained", "pixels": "raw pixels"}
PROTOCOLS = {"knn": "kNN"}
_UNLIKELY = 0.05
_PROPORTIONS = ("top1", "accuracy")
"""Measures that are fractions of the test images, which an interval can be given for."""


@dataclass(frozen=True)
class Measurement:
    """The main measure of one network in one result; `value`, `low` and `high` are shares, equal without an interval.

    Attributes:
        name: of the measure, such as top1.
        num_test: test images, 0 if the result does not say.
    """

    run: ReportedRun
    record: Record
    protocol: str
    network: str
    name: str
    value: float
    low: float
    high: float
    num_test: int

    @property
    def title(self) -> str:
        """Of the measure, for people."""
        return str(self.record.get("metric_title", self.name.replace("top1", "top-1")))

    def paired(self, other: Measurement) -> float | None:
        """How likely chance explains the difference, by McNemar's test on the same images; None if it was not made."""
        if other.record is not self.record or self.network != OWN:
            return None
        found = self.record["results"][other.network].get("against_pretrained")
        return float(found["p"]) if isinstance(found, dict) else None

    @property
    def has_interval(self) -> bool:
        """Whether it is said how far chance over the test images may have moved it."""
        return self.low < self.high

    def differs_from(self, other: Measurement) -> bool:
        """Whether chance over the test images is unlikely to explain the difference: a paired test says so with less
        than 5 %, or, where there is none, the intervals are apart. False without intervals: nothing tells.
        """
        if (p := self.paired(other)) is not None:
            return p < _UNLIKELY
        return self.is_above(other) or other.is_above(self)

    def is_above(self, other: Measurement) -> bool:
        """Whether there are intervals, and this one's begins above where the other's ends."""
        return self.has_interval and other.has_interval and self.low > other.high


def newest(runs: Sequence[ReportedRun]) -> list[Measurement]:
    """Those of the newest result of each protocol; protocols in the order of the first run that has them."""
    protocols = dict.fromkeys(protocol for run in runs for protocol in run.results.newest)
    return [
        one
        for protocol in protocols
        for run in runs
        if protocol in run.results.newest
        for one in of_record(run, run.results.newest[protocol])
    ]


def of_record(run: ReportedRun, record: Record) -> Iterator[Measurement]:
    """The numbers of one result; none if it has no measure that is known."""
    results = record.get("results")
    for network, result in results.items() if isinstance(results, dict) else ():
        if isinstance(result, dict) and (found := main_measure(record, result)):
            num_test = record.get("num_test", 0)
            low, high = interval(found[1], num_test) if found[0] in _PROPORTIONS else (found[1], found[1])
            yield Measurement(run, record, record["protocol"], network, *found, low, high, num_test)


def interval(share: float, num_images: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of `num_images` test images (Wilson's, 1927)."""
    if num_images < 1:
        return share, share
    found = binomtest(round(share * num_images), num_images).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def protocol_name(protocol: str) -> str:
    """As people write it."""
    return PROTOCOLS.get(protocol, protocol)


def network_name(network: str) -> str:
    """As people write it."""
    return NETWORKS.get(network, network)


def measured_on(record: Record) -> str:
    """Test images, training images and checkpoint of a result, as far as it says; what took no part is left out."""
    made_from: dict[str, Any] = record.get("made_from") or {}

    def of(part: str, num: str, what: str) -> str:
        shards = made_from.get(f"{part}_shards") or {}
        count, name = record.get(num), shards.get("name")
        return f"{count:,} {what}{f' of {name}' if name else ''}" if isinstance(count, int) and count else ""

    parts = [of("test", "num_test", "test images"), of("train", "num_train", "labelled training images")]
    parts.append(f"checkpoint of step {record['checkpoint_step']:,}")
    return ", ".join(filter(None, parts))
