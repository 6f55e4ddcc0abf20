"""The files of a run, read for a report; none of them needs to be there but the configuration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from largescale.config import Config, load_config
from largescale.evaluate.results import Results, read_results
from largescale.observe.metrics import METRICS, read_lines
from largescale.run.status import RunStatus, status_of
from shards.ground.errors import InputError

ENVIRONMENT = "environment.json"
_IN_EVERY_ROW = ("step", "epoch", "images_seen", "lr", "loss", "step_s", "data_wait_s", "skipped_samples")


@dataclass(frozen=True)
class ReportedRun:
    """A run as a report sees it.

    Attributes:
        path: its folder.
        label: what it is called on the page; no two runs of a page are called the same.
        number: its place on the page, which gives its colour.
        metrics: lines of metrics.jsonl that have the numbers that every line has.
        damage: sentences about files that cannot be read.
    """

    path: Path
    label: str
    number: int
    config: Config
    metrics: list[dict[str, Any]]
    results: Results
    environment: dict[str, Any]
    status: RunStatus
    damage: list[str]

    @property
    def steps(self) -> list[int]:
        """Steps of the logged lines."""
        return [row["step"] for row in self.metrics]

    def column(self, key: str) -> list[float]:
        """A column of the metrics, NaN where a line does not have it."""
        values = [row.get(key) for row in self.metrics]
        return [value if isinstance(value, int | float) else math.nan for value in values]

    @property
    def interval_steps(self) -> np.ndarray:
        """Steps [N] that each logged line sums up; the first says how many: a run may begin at a later step than 0."""
        before = [row["step"] - row.get("interval_steps", row["step"] + 1) for row in self.metrics[:1]]
        return np.diff(before + self.steps)

    @property
    def seconds(self) -> float:
        """Training time of all logged steps."""
        return float((np.asarray(self.column("step_s")) * self.interval_steps).sum())

    @property
    def is_running(self) -> bool:
        """Whether it trains now."""
        return self.status.state == "running"


def read_runs(run_dirs: list[Path]) -> list[ReportedRun]:
    """Read runs, in the order given.

    Raises:
        InputError: a folder is not that of a run.
    """
    read = [_read(path, number) for number, path in enumerate(run_dirs)]
    names = [run.config.name for run in read]
    labels = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, read, strict=True)]
    return [ReportedRun(**{**vars(run), "label": label}) for run, label in zip(read, labels, strict=True)]


def _read(run_dir: Path, number: int) -> ReportedRun:
    metrics, damage = run_dir / METRICS, list[str]()
    config = load_config(run_dir / "config.yaml")
    rows = read_lines(metrics) if metrics.is_file() else []
    whole = [row for row in rows if all(isinstance(row.get(key), int | float) for key in _IN_EVERY_ROW)]
    if len(whole) < len(rows):
        damage.append(f"{METRICS}: {len(rows) - len(whole):,} of {len(rows):,} lines lack numbers and are not shown.")
    try:
        path = run_dir / ENVIRONMENT
        environment = dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        environment = {}
        damage.append(f"{ENVIRONMENT} cannot be read ({error}), so it is not shown.")
    try:
        status = status_of(run_dir, watch=False)
    except InputError as error:
        done = whole[-1]["step"] + 1 if whole else 0
        status = RunStatus("unknown", done, 0, "?", "", None)
        damage.append(f"{error}.")
    return ReportedRun(run_dir, config.name, number, config, whole, read_results(run_dir), environment, status, damage)
