"""The report's part about evaluations: what was measured, on what, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from largescale.evaluate.headline import OWN, is_share
from largescale.evaluate.results import Record, age
from largescale.report import plots
from largescale.report.html_parts import details, escape, missing, section, table
from largescale.report.measurements import Measurement, measured_on, network_name, newest, of_record, protocol_name
from largescale.report.reported_run import ReportedRun
from largescale.report.unmeasured import first_protocol

_DO = {
    "untrained": "the untrained network does",
    "pixels": "raw pixels do",
    "centre": "the centre of each picture does",
    "chance": "chance does",
}
_PARTS = ("test", "train")


def notes(run: ReportedRun) -> list[str]:
    """What a reader should know before believing a number."""
    lines = [_refused(run.results.refused)] if run.results.refused else []
    for protocol, record in run.results.newest.items():
        name, found = protocol_name(protocol), {one.network: one for one in of_record(run, record)}
        own = found.get(OWN)
        better = [other for other in found if own and found[other].value > own.value]
        lines += [f"{name}: {_DO.get(other, other)} better than the pretrained network." for other in better]
        lines += [f"{name}: {warning}." for warning in record.get("warnings", ())]
        if old := age(record, run.path):
            lines.append(f"{name}: {old}.")
    return lines


_SWEPT = ("neighbours", "rates", "temperatures", "ranks")
"""Settings whose values are rows of their own."""


def _refused(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return (
        f"Not shown: {', '.join(names[:2])}{more}, changed or damaged since, or written by another version that "
        f"did not say what was measured. Run `largescale evaluate` again, or remove them."
    )


def section_of(runs: Sequence[ReportedRun]) -> str:
    """Bars and a table of the newest results, and a table of all."""
    title, found = "What it learned", newest(runs)
    if not found and any(run.results.all for run in runs):  # as of the spectrum
        return section(title, "No measurement is a share of images told right. All numbers:", _all(runs))
    if not found:
        how = f"largescale evaluate {first_protocol(runs[0].config)} RUN"
        return section(title, "", missing(f"Not measured yet; `{how}` does it."))
    several = len(runs) > 1
    on = dict.fromkeys(f"{protocol_name(one.protocol)}: {measured_on(one.record)}{_chosen(one)}." for one in found)
    text = "Intervals are Wilson's at 95 % over the test images. What was measured on what:"
    lines = "".join(f"<li>{escape(line)}</li>" for line in on)
    charts = "".join(f"<div>{plots.in_page(figure, name, _alt(found, name))}</div>" for name, figure in figures(runs))
    rows = [_row(one, several) for one in found]
    heads = ["run"] * several + ["protocol", "features", "%", "95 % interval", "test images", "step"]
    shown = table("Newest results", heads, rows, numbers_from=2 + several)
    body = f'<ul class="lines">{lines}</ul><div class="grid">{charts}</div>{shown}'
    num_all = sum(len(run.results.all) for run in runs)
    many = "s" * (num_all != 1)
    return section(title, text, body + details(f"All numbers, of {num_all} measurement{many}", _all(runs)))


def figures(runs: Sequence[ReportedRun]) -> Iterator[tuple[str, Figure]]:
    """A bar chart of each protocol, with its name."""
    found = newest(runs)
    for protocol in dict.fromkeys(one.protocol for one in found):
        of_protocol = [one for one in found if one.protocol == protocol]
        yield (
            f"accuracy-{protocol}",
            plots.bars(
                f"{protocol_name(protocol)} {of_protocol[0].title}, %, with 95 % intervals",
                [
                    (_label(one, runs), 100 * one.value, 100 * one.low, 100 * one.high, _number(one, runs))
                    for one in of_protocol
                ],
            ),
        )


def _chosen(one: Measurement) -> str:
    """What settings were chosen on, where the result says it."""
    chosen_on = one.record.get("chosen_on")
    return f"; settings chosen on: {chosen_on}" if isinstance(chosen_on, str) and chosen_on else ""


def _number(one: Measurement, runs: Sequence[ReportedRun]) -> int:
    """The colour of its bar: that of its run; with one run, that of its network."""
    return one.run.number if len(runs) > 1 else list(_order(one.record)).index(one.network) * 6 % len(plots.PALETTE)


def _order(record: Record) -> list[str]:
    return list(record["results"])


def _label(one: Measurement, runs: Sequence[ReportedRun]) -> str:
    network = network_name(one.network)
    return f"{one.run.label} · {network}" if len(runs) > 1 else network


def _alt(found: list[Measurement], name: str) -> str:
    of_protocol = [one for one in found if name == f"accuracy-{one.protocol}"]
    values = "; ".join(f"{one.run.label} {network_name(one.network)} {100 * one.value:.1f}" for one in of_protocol)
    return f"{protocol_name(of_protocol[0].protocol)} {of_protocol[0].title} in percent: {values}"


def _row(one: Measurement, several: bool) -> list[str]:
    apart = f"{100 * one.low:.1f} to {100 * one.high:.1f}" if one.low < one.high else ""
    cells = [protocol_name(one.protocol), network_name(one.network), f"{100 * one.value:.1f}", apart]
    return [one.run.label] * several + [*cells, f"{one.num_test:,}", f"{one.record['checkpoint_step']:,}"]


def _all(runs: Sequence[ReportedRun]) -> str:
    several = len(runs) > 1
    rows = [
        [run.label] * several + row
        for run in runs
        for record in run.results.all
        for row in _rows(run, record, _settings_that_differ(run.results.all, record["protocol"]))
    ]
    heads = ["run"] * several + ["protocol", "features", "test images", "training images", "step", "measure", "value"]
    return table("All measurements", heads, rows, numbers_from=4 + several)


def _rows(run: ReportedRun, record: Record, differing: list[str]) -> Iterator[list[str]]:
    """A row for each number of a result: its measures, and those of sweeps."""
    settings = "".join(f", {key} {_settings(record).get(key, '?')}" for key in differing)
    made_from = record.get("made_from") or {}
    took_part = [part for part in _PARTS if record.get(f"num_{part}") != 0]
    where = [(made_from.get(f"{part}_shards") or {}).get("name", "") if part in took_part else "" for part in _PARTS]
    step = f"{record['checkpoint_step']}{' (old)' if age(record, run.path) else ''}"
    for network, result in record["results"].items():
        for what, measure, value in _numbers(record, result):
            name = f"{protocol_name(record['protocol'])}{what}{settings}"
            yield [name, network_name(network), *where, step, measure, value]


def _numbers(record: Record, result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What stands behind the protocol's name, the measure and its value: percentages where it is a share."""
    for name, value in result.items():
        if isinstance(value, dict) and (swept := name.partition("_by_"))[2]:
            yield from (
                (f", {swept[2]} = {key}", swept[0], _as_text(record, swept[0], one))
                for key, one in value.items()
                if _is_number(one)
            )
        elif isinstance(value, dict) and name.startswith("by_") and not any(key.endswith(f"_{name}") for key in result):
            yield from _nested(record, name.removeprefix("by_"), value)
        elif _is_number(value) and f"{name}_by_k" not in result:
            yield "", name.replace("_", " "), _as_text(record, name, value)


def _nested(record: Record, by: str, found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The numbers under `by_SOMETHING`: measured once, or once for each share."""
    for key, one in found.items():
        if isinstance(one, dict):
            for name, value in one.items():
                if _is_number(value):
                    yield f", {by} = {key}", name.replace("_", " "), _as_text(record, name, value)
        elif _is_number(one):
            yield f", by {by}", key.replace("_", " "), _as_text(record, key, one)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_text(record: Record, name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if is_share(record, name, value) else f"{value:g}"


def _settings(record: Record) -> dict[str, Any]:
    """What may tell a measurement from another one of the same shards and checkpoint."""
    prefix, settings = f"{record['protocol'].replace('-', '_')}_", record.get("settings") or {}
    own = {
        key.removeprefix(prefix).replace("_", " "): value for key, value in settings.items() if key.startswith(prefix)
    }
    images = (record.get("made_from") or {}).get("images") or {}
    images = {key: value for key, value in images.items() if key != "precision"}
    return {**images, **{key: value for key, value in own.items() if key not in _SWEPT}}


def _settings_that_differ(records: list[Record], protocol: str) -> list[str]:
    of_protocol = [_settings(record) for record in records if record["protocol"] == protocol]
    return [key for key, value in of_protocol[0].items() if any(one.get(key) != value for one in of_protocol)]
