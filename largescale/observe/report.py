"""`report.html`: one self-contained page that shows what a run did and learned.

It is made only from the run's files, so it can be made while the run is still going; a sentence stands in for what is
not there yet.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largescale.config import Config, corpus_names, load_config
from largescale.evaluate.results import Results, read_results
from largescale.methods import method_class
from largescale.observe import plots, report_results
from largescale.observe.console import format_seconds
from largescale.observe.doctor import Doctor
from largescale.observe.html_parts import missing, section
from largescale.observe.metrics import METRICS, read_lines
from shards.ground.files import atomic_write

ENVIRONMENT = "environment.json"
_IN_EVERY_ROW = ("step", "epoch", "images_seen", "lr", "loss", "step_s", "data_wait_s", "skipped_samples")


@dataclass(frozen=True)
class _Run:
    """The files of a run, read."""

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    results: Results
    environment: dict[str, Any]
    damage: list[str]


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html.

    Returns:
        Its path.

    Raises:
        InputError: not the folder of a run.
    """
    run = _read(run_dir)
    sections = [
        _training(run),
        report_results.accuracy(run_dir, run.results),
        report_results.images(run_dir, run.config),
        _settings(run),
    ]
    style = Path(__file__).with_name("report.css").read_text()
    title = html.escape(run.config.name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} · report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{_headline(run)}{''.join(sections)}</main></body></html>\n"
    )
    path = run_dir / "report.html"
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def _read(run_dir: Path) -> _Run:
    metrics, damage = run_dir / METRICS, list[str]()
    rows = read_lines(metrics) if metrics.is_file() else []
    whole = [row for row in rows if all(isinstance(row.get(key), int | float) for key in _IN_EVERY_ROW)]
    if len(whole) < len(rows):
        damage.append(f"{METRICS}: {len(rows) - len(whole):,} of {len(rows):,} lines lack numbers and are not shown.")
    try:
        path = run_dir / ENVIRONMENT
        environment = dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        environment = {}
        damage.append(f"{ENVIRONMENT} cannot be read ({error}), so it is not shown.")
    return _Run(run_dir, load_config(run_dir / "config.yaml"), whole, read_results(run_dir), environment, damage)


def _headline(run: _Run) -> str:
    config = run.config
    if run.metrics:
        last = run.metrics[-1]
        done = f"{last['images_seen']:,} images seen in {last['step'] + 1:,} steps ({last['epoch']:.1f} epochs)"
    else:
        done = "nothing logged yet"
    sentence = (
        f"{method_class(config).title} on {corpus_names(config.data)}: "
        f"{config.model.backbone}, {config.parallel.strategy}, {done}, without labels."
    )
    notes = "".join(f'<div class="note">{html.escape(note)}</div>' for note in _notes(run))
    tiles = report_results.tiles(run.results)
    return f"<header><h1>{html.escape(config.name)}</h1><p>{html.escape(sentence)}</p></header>{tiles}{notes}"


def _notes(run: _Run) -> list[str]:
    """What looks wrong, in plain words."""
    notes = list(run.damage)
    if run.metrics:
        last = run.metrics[-1]
        doctor = Doctor(run.config)
        trouble = [doctor.look(row) for row in run.metrics[-2:]][-1]
        if trouble:
            notes.append(f"At the last logged step {trouble}.")
        if last["skipped_samples"]:
            notes.append(f"{last['skipped_samples']:,} images could not be read; {run.path.name}/skipped lists them.")
    return [*notes, *report_results.notes(run.path, run.results)]


def _training(run: _Run) -> str:
    if not run.metrics:
        return section("Training", "", missing("Nothing is logged yet; `largescale pretrain` writes it."))
    rows = run.metrics
    steps = [row["step"] for row in rows]

    def column(key: str) -> list[float]:
        values = [row.get(key) for row in rows]
        return [value if isinstance(value, int | float) else math.nan for value in values]

    method, cached = method_class(run.config), "cache_hit_rate" in rows[-1]
    panels = [
        plots.curves("Loss", steps, {"loss": column("loss")}, references=method.loss_references(run.config)),
        plots.curves("Learning rate", steps, {"learning rate": column("lr")}),
        *(
            plots.curves(
                panel.title, steps, {label: column(key) for label, key in panel.columns.items()}, ylim=panel.limits
            )
            for panel in method.panels(run.config)
        ),
        plots.curves("Gradient norm", steps, {"gradient norm": column("grad_norm")}),
        plots.curves("Images per second, all ranks", steps, {"images/s": column("images_per_s")}),
        plots.curves(
            "Seconds per step", steps, {"whole step": column("step_s"), "waiting for data": column("data_wait_s")}
        ),
        plots.curves(
            "Making an image's views, ms of one loader thread",
            steps,
            {"read and verify": column("read_ms"), "decode": column("decode_ms"), "crop": column("crop_ms")},
        ),
        plots.curves(
            "Batches ready" + ", and shards found in the cache" * cached,
            steps,
            {
                "batches ready besides the one taken": column("queue_depth"),
                **({"share of shards found": column("cache_hit_rate")} if cached else {}),
            },
        ),
    ]
    seconds = sum(row["step_s"] * (row["step"] - before) for row, before in zip(rows, [-1, *steps[:-1]], strict=True))
    ranks = run.environment.get("world_size", "?")
    text = (
        f"{rows[-1]['images_seen'] / seconds:,.0f} images/s over {format_seconds(seconds)} of training on "
        f"{ranks} rank{'s' * (ranks != 1)}; {sum(column('data_wait_s')) / sum(column('step_s')):.0%} of "
        f"the time went into reading and augmenting."
    )
    return section("Training", text, f'<div class="grid">{"".join(f"<div>{panel}</div>" for panel in panels)}</div>')


def _settings(run: _Run) -> str:
    config = html.escape((run.path / "config.yaml").read_text())
    environment = html.escape(json.dumps(run.environment, indent=1))
    body = (
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
        f"<details><summary>Environment</summary><pre>{environment}</pre></details>"
    )
    return section("Settings", "Running the configuration again repeats the run.", body)
