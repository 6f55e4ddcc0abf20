"""The report: one self-contained page that shows what runs did and learned.

It is made only from the files of runs, so it can be made while they are still going; a sentence stands in for what is
not there yet. Several runs are compared: curves, results and settings; images are of one run alone.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.config import corpus_names
from largescale.methods import method_class
from largescale.report import evaluation, images, plots, settings, skipped, time_spent, training, verdict
from largescale.report.html_parts import document, escape
from largescale.report.reported_run import ReportedRun, read_runs
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

MOST_RUNS = 16
_MOST_ROWS = 2000
"""Logged lines that the page holds as numbers, of all runs together."""


@dataclass(frozen=True)
class Wanted:
    """What to write, and how.

    Attributes:
        out: the page; None for RUN/report.html, or with several runs report.html in the folder that holds the first.
        figures: folder for the plots as NAME.svg and NAME.png; None for none.
        smooth: logged lines that running averages span; None for a fortieth of them, 0 for none.
        watch_s: seconds after which the page is written again, and an open one loads itself again, while a run
            trains; 0 writes it once.
    """

    out: Path | None = None
    figures: Path | None = None
    smooth: int | None = None
    watch_s: float = 0


def report(run_dirs: Sequence[Path], wanted: Wanted) -> Iterator[Path]:
    """Write the page and what else is wanted, and yield the path of each file once; ends with the last run's training.

    Raises:
        InputError: not the folder of a run, too many of them, a folder in place of the page, or a number below 0.
    """
    if not wanted.watch_s >= 0 or (wanted.smooth or 0) < 0:
        raise InputError("--watch and --smooth: expected 0 or more")
    if wanted.out and wanted.out.is_dir():
        raise InputError(f"--out {wanted.out}: is a folder; name a file in it, such as {wanted.out / 'report.html'}")
    told = set[Path]()
    while True:
        path, running = write_report(run_dirs, wanted)
        figures = write_figures(run_dirs, wanted.figures, smooth=wanted.smooth) if wanted.figures else []
        yield from (one for one in (path, *figures) if one not in told)
        told |= {path, *figures}
        if not (running and wanted.watch_s):
            return
        time.sleep(wanted.watch_s)


def write_report(run_dirs: Sequence[Path], wanted: Wanted) -> tuple[Path, bool]:
    """Write the page once.

    Returns:
        Its path, and whether any of the runs is training.

    Raises:
        InputError: not the folder of a run, or too many of them.
    """
    if len(run_dirs) > MOST_RUNS:
        raise InputError(
            f"{len(run_dirs)} runs: a page compares at most {MOST_RUNS}; `largescale runs` lists any number"
        )
    runs = read_runs(list(run_dirs))
    beside = runs[0].path if len(runs) == 1 else runs[0].path.absolute().parent
    path, running = wanted.out or beside / "report.html", any(run.is_running for run in runs)
    page = _page(runs, wanted.smooth, wanted.watch_s if running else 0)
    with atomic_write(path) as file:
        file.write(page.encode())
    return path, running


def write_figures(run_dirs: Sequence[Path], folder: Path, *, smooth: int | None = None) -> list[Path]:
    """Write the page's plots as files: NAME.svg and NAME.png for each.

    Returns:
        Their paths.

    Raises:
        InputError: not the folder of a run.
    """
    runs = read_runs(list(run_dirs))
    figures = [*training.figures(runs, smooth), *evaluation.figures(runs)]
    if len(runs) == 1:
        figures += images.map_figures(runs[0])
    return [path for name, figure in figures for path in plots.save(figure, folder, name)]


def _page(runs: Sequence[ReportedRun], smooth: int | None, refresh_s: float) -> str:
    single = runs[0] if len(runs) == 1 else None
    title = " · ".join([*(run.label for run in runs), "report"])
    command = "largescale report " + shlex.join(str(run.path) for run in runs)
    parts = [
        verdict.section_of(runs),
        *(_notes(run, name=single is None) for run in runs),
        evaluation.section_of(runs),
        "" if single else settings.differing(runs),
        training.section_of(runs, smooth),
        time_spent.section_of(runs),
        *((images.sections_of(single), skipped.section_of(single)) if single else ()),
        settings.section_of(runs, command),
    ]
    refresh = f'<meta http-equiv="refresh" content="{refresh_s:g}">' if refresh_s else ""
    # A script in place, as the page stands alone; only the picture under the pointer needs it.
    script = Path(__file__).with_name("map.js").read_text() if single else ""
    parts.append(f'<script type="application/json" id="numbers">{_numbers(runs)}</script><script>{script}</script>')
    return document(title, _header(runs), "".join(parts), head=refresh)


def _header(runs: Sequence[ReportedRun]) -> str:
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    if len(runs) > 1:
        return f"<h1>{len(runs)} runs compared</h1><p>Made {made}.</p>"
    (run,) = runs
    config = run.config
    labels = "with" if config.method.uses_labels() else "without"
    sentence = (
        f"{method_class(config).title} on {corpus_names(config.data)}: {config.model.backbone}, "
        f"{config.parallel.strategy}, {labels} labels. Made {made}."
    )
    return f"<h1>{escape(config.name)}</h1><p>{escape(sentence)}</p>"


def _notes(run: ReportedRun, *, name: bool) -> str:
    """What looks wrong, in plain words."""
    lines = list(run.damage)
    if run.metrics and (number := run.metrics[-1]["skipped_samples"]):
        lines.append(f"{number:,} images could not be read; {run.path.name}/skipped lists them.")
    lines += evaluation.notes(run)
    prefix = f"{run.label}: " if name else ""
    return "".join(f'<div class="note">{escape(prefix + line)}</div>' for line in lines)


def _numbers(runs: Sequence[ReportedRun]) -> str:
    """What the page shows, as JSON that no markup can end early."""
    most = max(2, _MOST_ROWS // len(runs))
    found = [
        {
            "run": str(run.path),
            "label": run.label,
            "status": vars(run.status),
            "metrics": _every(run.metrics, most),
            "metrics_rows": len(run.metrics),
            "results": run.results.all,
            "environment": run.environment,
        }
        for run in runs
    ]
    return json.dumps(found, default=str).replace("<", "\\u003c")


def _every(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of the rows, evenly spread, the last one among them."""
    step = -(-len(rows) // most) if rows else 1
    return rows[::-1][::step][::-1]
