"""Where the time of runs went, by what their metrics say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from largescale.observe.console import format_seconds
from largescale.report.html_parts import escape, missing, section, table
from largescale.report.reported_run import ReportedRun

COMPUTING, WAITING, AUGMENTING, SAVING = "computing", "waiting for data", "augmenting", "saving"
PHASES, MEASURING = "offline phases", "measuring online"


def section_of(runs: Sequence[ReportedRun]) -> str:
    """A bar of each run, and a table of the same numbers."""
    title, found = "Where time went", [(run, spent(run)) for run in runs if run.metrics]
    if not found:
        return section(title, "", missing("Nothing is logged yet."))
    kinds = list(dict.fromkeys(kind for _, parts in found for kind in parts))
    rows = [
        [run.label, *(f"{parts.get(kind, 0) / total(parts):.1%}" for kind in kinds), format_seconds(total(parts))]
        for run, parts in found
    ]
    keys = "".join(
        f'<li><i style="background:var(--line-{place})"></i>{escape(kind)}</li>' for place, kind in enumerate(kinds)
    )
    bars = f'{"".join(_bar(run, parts, kinds) for run, parts in found)}<ul class="legend">{keys}</ul>'
    text = "Of the time between the first and the last logged step. Computing includes exchanges between ranks."
    return section(title, text, bars + table("Where time went", ["run", *kinds, "in all"], rows, numbers_from=1))


def spent(run: ReportedRun) -> dict[str, float]:
    """Seconds by what they were spent on: those of the logged steps, and between them those of measuring online."""
    steps = run.interval_steps

    def sum_of(key: str, each: np.ndarray) -> float:
        return float((np.nan_to_num(np.asarray(run.column(key))) * each).sum())

    once = np.ones(len(steps))
    waiting, augmenting = sum_of("data_wait_s", steps), sum_of("augment_s", steps)
    parts = {WAITING: max(0.0, waiting - augmenting), AUGMENTING: augmenting, SAVING: sum_of("save_s", once)}
    parts[PHASES] = sum_of("phase_s", once)
    computing = max(0.0, run.seconds - sum(parts.values()))
    parts = {COMPUTING: computing, **parts, MEASURING: sum_of("online_s", once)}
    return {kind: seconds for kind, seconds in parts.items() if seconds > 0}


def total(parts: dict[str, float]) -> float:
    """All seconds."""
    return sum(parts.values()) or 1.0


def _bar(run: ReportedRun, parts: dict[str, float], kinds: list[str]) -> str:
    pieces = "".join(
        f'<span style="width:{100 * parts[kind] / total(parts):.2f}%;background:var(--line-{kinds.index(kind)})"'
        f' title="{escape(kind)} {parts[kind] / total(parts):.1%}"></span>'
        for kind in kinds
        if kind in parts
    )
    says = ", ".join(f"{kind} {seconds / total(parts):.0%}" for kind, seconds in parts.items())
    label = f"{run.label}: {says}"
    return f'<div class="bar" role="img" aria-label="{escape(label)}">{pieces}</div>'
