"""What runs were told: settings that differ between them, all of them, their environment, and how to repeat them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largescale.config import flatten
from largescale.report.html_parts import details, escape, section, table
from largescale.report.reported_run import ReportedRun

_OF_THE_FOLDER = ("run.dir",)


def differing(runs: Sequence[ReportedRun]) -> str:
    """A table of the settings that are not the same in all runs, and of what they ran on."""
    flat = [{**flatten(run.config), **_machine(run)} for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [
        [key, *(_shown(one.get(key)) for one in flat)]
        for key in keys
        if key not in _OF_THE_FOLDER and any(one.get(key) != flat[0].get(key) for one in flat)
    ]
    text = "" if rows else "No setting differs."
    heads = ["setting", *(run.label for run in runs)]
    body = table("Settings that differ", heads, rows, numbers_from=len(heads)) if rows else ""
    return section("Settings that differ", text, body)


def _machine(run: ReportedRun) -> dict[str, Any]:
    known = ("world_size", "git_revision", "torch", "processor", "devices")
    return {f"({name.replace('_', ' ')})": run.environment.get(name) for name in known}


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def section_of(runs: Sequence[ReportedRun], report_command: str) -> str:
    """Commands to repeat everything, configuration and environment."""
    parts = []
    for run in runs:
        name = f"{run.label}: " if len(runs) > 1 else ""
        config = (run.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        parts += [
            details(f"{name}configuration", f'<pre tabindex="0">{escape(config)}</pre>'),
            details(f"{name}environment", f'<pre tabindex="0">{escape(json.dumps(run.environment, indent=1))}</pre>'),
        ]
    lines = dict.fromkeys([line for run in runs for line in commands(run)] + [report_command])
    body = f'<pre tabindex="0">{escape(chr(10).join(lines))}</pre>{"".join(parts)}'
    text = (
        "These commands repeat all of it. Training by the run's own config.yaml in another folder gives the same run."
    )
    return section("To repeat it", text, body)


def commands(run: ReportedRun) -> list[str]:
    """How a run was started, and what repeats its training and its evaluations."""
    ranks = run.environment.get("world_size", 1)
    start = f"torchrun --standalone --nproc-per-node={ranks} -m largescale" if ranks != 1 else "largescale"
    config = shlex.quote(str(run.path / "config.yaml"))
    lines = [f"{start} pretrain {config} run.dir={shlex.quote(str(run.path) + '-again')}"]
    command = run.environment.get("command")
    if isinstance(command, list):
        started = shlex.join(map(str, ["largescale", *command[1:]]))
        lines.insert(0, f"# {run.label} was started on {ranks} rank{'s' * (ranks != 1)} by: {started}")
    return lines + [_evaluation(run, record) for record in run.results.newest.values()]


def _evaluation(run: ReportedRun, record: dict[str, Any]) -> str:
    settings, own = record.get("settings") or {}, vars(run.config.evaluate)
    changed = [
        shlex.quote(f"evaluate.{key}={_shown(value)}")
        for key, value in settings.items()
        if own.get(key, value) != value
    ]
    shards = {"data.eval_shards": record.get("test_shards"), "evaluate.train_shards": record.get("train_shards")}
    places = run.config.data.eval_shards, run.config.data.shards, run.config.evaluate.train_shards
    known = {None, *(place for place in places if isinstance(place, str))}  # several corpora are a list
    elsewhere = [f"{key}={shlex.quote(str(place))}" for key, place in shards.items() if not _same(place, known)]
    return " ".join(["largescale evaluate", record["protocol"], shlex.quote(str(run.path)), *elsewhere, *changed])


def _same(place: Any, known: set[Any]) -> bool:
    names = {str(Path(one).resolve()) for one in known if isinstance(one, str) and one and "://" not in one}
    return place in known or place in names
