"""The first thing on the page: is it learning, is it better than nothing, and what did it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from largescale.evaluate.headline import OWN
from largescale.observe.console import format_seconds
from largescale.observe.doctor import is_young, judge
from largescale.report.html_parts import escape
from largescale.report.measurements import Measurement, network_name, newest, protocol_name
from largescale.report.reported_run import ReportedRun
from largescale.report.unmeasured import first_protocol

GOOD, BAD, OPEN = "good", "bad", "open"
_MARKS = {GOOD: "✓", BAD: "✗", OPEN: "?"}
_FEWEST_LINES = 6
"""Logged lines below which a fall of the loss says nothing."""


class Answer(NamedTuple):
    """A question, whether the answer is good, bad or open, and the answer in words."""

    question: str
    kind: str
    text: str


def section_of(runs: Sequence[ReportedRun]) -> str:
    """The answers for each run."""
    parts = []
    for run in runs:
        items = "".join(
            f'<li class="{one.kind}"><span class="mark" aria-hidden="true">{_MARKS[one.kind]}</span>'
            f"<div><b>{escape(one.question)}</b> {escape(one.text)}</div></li>"
            for one in answers(run)
        )
        name = f"<h3>{escape(run.label)}</h3>" if len(runs) > 1 else ""
        parts.append(f'<div class="verdict">{name}<ul>{items}</ul></div>')
    return f'<section><h2>Verdict</h2><div class="verdicts">{"".join(parts)}</div></section>'


def answers(run: ReportedRun) -> Iterator[Answer]:
    """What can be said of a run so far."""
    yield _where(run)
    yield _learning(run)
    yield from _better(run)
    yield _cost(run)


def _where(run: ReportedRun) -> Answer:
    status = run.status
    if run.is_running or status.state == "not running":
        left = _left(run) if run.is_running else ""
        kind = OPEN if run.is_running else BAD
    else:
        left, kind = "", {"complete": GOOD, "failed": BAD}.get(status.state, OPEN)
    share = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    why = f"; {status.why}" if status.why and not run.is_running else ""
    return Answer("Where is it?", kind, f"{status.state.capitalize()}, step {status.step:,}{share}{left}{why}.")


def _left(run: ReportedRun) -> str:
    if not run.metrics or not run.status.steps:
        return ""
    pace = float(np.median(run.column("step_s")[-20:]))
    return f", about {format_seconds(pace * (run.status.steps - run.status.step))} left"


def _learning(run: ReportedRun) -> Answer:
    question, loss = "Is it learning?", np.asarray(run.column("loss"))
    if len(loss) < _FEWEST_LINES:
        return Answer(question, OPEN, f"Too early to say, after {len(loss)} logged lines.")
    if trouble := judge(run.config, run.metrics):
        return Answer(question, BAD, f"It looks wrong: {trouble}.")
    if "progress" in run.metrics[-1] and is_young(run.config, run.metrics[-1]):
        return Answer(question, OPEN, f"Too early to say: the run is young, {run.metrics[-1]['progress']:.0%} done.")
    tenth = max(2, len(loss) // 10)
    first, last = loss[:tenth], loss[-tenth:]
    # Noise: that of the differences between neighbouring lines, which a trend hardly touches.
    noise = float(np.std(np.diff(loss)) / np.sqrt(2) * np.sqrt(2 / tenth))
    fell = first.mean() - last.mean()
    says = f"the loss went from {first.mean():.3f} to {last.mean():.3f} (first and last tenth of the steps)"
    if fell > 2 * noise:
        return Answer(question, GOOD, f"Yes: {says}.")
    return Answer(question, OPEN, f"The loss does not tell: {says}. Measure it: {_measuring(run)}.")


def _measuring(run: ReportedRun) -> str:
    return f"largescale evaluate {first_protocol(run.config)} {run.path}"


def _better(run: ReportedRun) -> Iterator[Answer]:
    found = newest([run])
    if not any(one.network == OWN for one in found):
        text = f"Not measured yet: {_measuring(run)}."
        if run.results.newest:
            names = ", ".join(map(protocol_name, run.results.newest))
            text = f"Measured by {names}, which gives no share of images told right; see the numbers below."
        yield Answer("Better than untrained, and than pixels?", OPEN, text)
    for own in (one for one in found if one.network == OWN):
        others = [one for one in found if one.protocol == own.protocol and one is not own]
        against = ", ".join(
            f"{network_name(one.network)} {100 * one.value:.1f} ({_versus(own, one)})" for one in others
        )
        range_ = f" ({100 * own.low:.1f} to {100 * own.high:.1f})" if own.low < own.high else ""
        text = f"{100 * own.value:.1f} %{range_}{' against ' if against else ''}{against}."
        name = protocol_name(own.protocol)
        yield Answer(f"Better, by {name} {own.title}?", _kind(own, others), text)


def _kind(own: Measurement, others: list[Measurement]) -> str:
    if not others or not all(own.differs_from(one) for one in others):
        return BAD if any(one.is_above(own) for one in others) else OPEN
    return GOOD if all(own.value > one.value for one in others) else BAD


def _versus(own: Measurement, other: Measurement) -> str:
    by = f"{100 * (own.value - other.value):+.1f} points"
    if (p := own.paired(other)) is not None:
        return f"{by}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    if not (own.has_interval and other.has_interval):
        return f"{by}, no interval"
    return by if own.differs_from(other) else f"{by}, the intervals overlap"


def _cost(run: ReportedRun) -> Answer:
    question = "What did it cost?"
    if not run.metrics:
        return Answer(question, OPEN, "Nothing is logged yet.")
    last, seconds, ranks = run.metrics[-1], run.seconds, run.environment.get("world_size")
    parts = [f"{format_seconds(seconds)} of training"]
    if isinstance(ranks, int):
        devices = run.environment.get("devices") or ["?"]
        unit = "core" if devices == ["cpu"] else "GPU"
        parts.append(f"{ranks} rank{'s' * (ranks != 1)} on {devices[0]}")
        if unit == "GPU":
            parts.append(f"{seconds * ranks / 3600:,.1f} GPU-hours")
    parts += [f"{last['images_seen']:,} images", f"{last['images_seen'] / seconds:,.0f} images/s"]
    return Answer(question, GOOD, ", ".join(parts) + ".")
