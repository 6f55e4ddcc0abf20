"""Trackers get what metrics.jsonl gets, and nothing that happens to them happens to the run."""

from __future__ import annotations

import importlib
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from largescale.cli import main
from largescale.distributed import stopping
from largescale.observe import trackers
from largescale.observe.metrics import MetricsLog, read_lines
from largescale.observe.trackers import SESSIONS, Tracker, require
from shards.ground.errors import InputError

CONFIG = {"optim.lr": 0.1, "run.trackers": ["wandb"], "model.name": "x" * 900}


@pytest.fixture
def offline(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def sqlite(monkeypatch, tmp_path):
    """MLflow without a server: its client writes the database itself, where that is installed."""
    uri = os.environ.get("TEST_MLFLOW_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return uri


def write(run_dir, name: str, first: int, last: int) -> Tracker:
    tracker = Tracker(name, run_dir, "a run", CONFIG)
    log = MetricsLog(run_dir, first, [tracker])
    for step in range(first, last):
        log.write({"step": step, "loss": 1.0 / (step + 1), "not a number": float("nan")})
    log.close()
    return tracker


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a file of W&B: those of a LevelDB log, behind a header of 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # the end of a block is padding
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_rows(run_dir: Path, expected: int) -> list[dict[str, str]]:
    """What W&B has on disk of all sessions of a run; its service writes the last steps after a session has ended."""
    deadline = time.monotonic() + 120
    while len(rows := wandb_rows_now(run_dir)) < expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return rows


def wandb_rows_now(run_dir: Path) -> list[dict[str, str]]:
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
    return rows


def test_wandb_offline_has_every_step_and_goes_on_in_the_same_run(tmp_path, offline, caplog):
    write(tmp_path, "wandb", 0, 3)
    before = (tmp_path / trackers.FILE).read_text()
    write(tmp_path, "wandb", 3, 5)
    assert (tmp_path / trackers.FILE).read_text() == before and '"wandb"' in before
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    rows = wandb_rows(tmp_path, 5)
    assert [int(row["_step"]) for row in rows] == [0, 1, 2, 3, 4]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert not any("not a number" in row for row in rows)


@pytest.mark.skipif(
    "TEST_MLFLOW_URI" not in os.environ, reason="needs TEST_MLFLOW_URI, an MLflow server (docs/report.md)"
)
def test_an_mlflow_server_has_every_step_and_the_settings(tmp_path, sqlite):
    from mlflow.tracking import MlflowClient

    for first, last in ((0, 3), (3, 5)):
        write(tmp_path, "mlflow", first, last)
    (run_id,) = trackers._ids(tmp_path).values()
    history = MlflowClient().get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1.0 / (step + 1)) for step in range(5)]
    run = MlflowClient().get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["optim.lr"] == "0.1"


def test_a_server_that_cannot_be_reached_costs_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    write(tmp_path, "mlflow", 0, 5)
    (record,) = [one for one in caplog.records if one.name.startswith("largescale")]
    assert record.levelno == logging.WARNING and "mlflow: " in record.message and "\n" not in record.message
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 5


class Stuck:
    """A tracker that takes one step and then hangs."""

    run_id = "1"
    released = threading.Event()

    def __init__(self, *_: object) -> None:
        pass

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self.released.wait()

    def close(self, *, whole: bool) -> None:
        pass


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(SESSIONS, "wandb", Stuck)
    monkeypatch.setattr(trackers, "END_S", 0.05)
    monkeypatch.setattr(trackers, "MAX_WAITING", 10)
    write(tmp_path, "wandb", 0, 3)
    write(tmp_path, "wandb", 3, 50)
    says = [record.message for record in caplog.records]
    assert len(says) == 2 and "did not take everything" in says[0] and "10 logged steps wait" in says[1]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 50
    Stuck.released.set()


def test_a_tracker_that_is_not_installed_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"run.trackers=mlflow: not installed; .*pip install 'largescale\[mlflow\]'"):
        require(["mlflow"])


def test_a_run_sends_what_it_logs(tiny_overrides, offline, tmp_path):
    assert main(["pretrain", "tests/tiny.yaml", *tiny_overrides("run.trackers=[wandb]", "train.steps=2")]) == 0
    rows = wandb_rows(tmp_path / "run", 2)
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in read_lines(tmp_path / "run/metrics.jsonl")]


class Kept:
    """A tracker in this process that takes its time."""

    run_id = "1"
    rows: ClassVar[list[tuple[int, float]]] = []
    ends: ClassVar[list[bool]] = []

    def __init__(self, *_: object) -> None:
        pass

    def log(self, step: int, scalars: dict[str, float]) -> None:
        time.sleep(0.2)
        self.rows.append((step, scalars["loss"]))

    def close(self, *, whole: bool) -> None:
        self.ends.append(whole)


def test_a_run_that_stops_or_fails_sends_what_it_has_logged(tiny_overrides, tmp_path, monkeypatch):
    monkeypatch.setitem(SESSIONS, "wandb", Kept)
    monkeypatch.setattr(trackers, "STOP_S", 60.0)
    command = ["pretrain", "tests/tiny.yaml", *tiny_overrides("run.trackers=[wandb]", "train.steps=3")]
    with monkeypatch.context() as asked:
        asked.setattr(stopping, "reason", lambda *_: "SIGTERM")
        assert main(command) == 85 and Kept.ends == [False]
    loop = importlib.import_module("largescale.pretrain")  # the attribute of that name is the function
    monkeypatch.setattr(loop, "too_many_skipped", lambda *_: "too many")
    assert main(command) == 3 and Kept.ends == [False, False]
    rows = read_lines(tmp_path / "run/metrics.jsonl")
    assert Kept.rows == [(row["step"], row["loss"]) for row in rows] and [row["step"] for row in rows] == [0, 1]
