"""A run that begins again where a former one was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from largescale.config import load_config, to_yaml
from largescale.run.former import set_aside_former
from largescale.run.status import write_status
from tests.helpers.commands import ROOT


def config(*overrides: str):
    return load_config(ROOT / "tests" / "tiny.yaml", ["data.shards=x", *overrides])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a run leaves that was killed before its first checkpoint."""
    (tmp_path / "audit").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "config.yaml").write_text(to_yaml(config("run.dir=elsewhere")))
    (tmp_path / "notes.txt").write_text("mine")
    write_status(tmp_path, "running", 0, 14)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_again_as_it_was(run, state):
    write_status(run, state, 3, 14)
    before = names(run)
    set_aside_former(run, config())
    assert names(run) == before


@pytest.mark.parametrize("sign", ["saved", "complete", "eval", "rollbacks.jsonl", "other configuration"])
def test_a_former_run_is_set_aside(run, sign, caplog):
    if sign in ("saved", "complete"):
        write_status(run, "stopped" if sign == "saved" else sign, 9, 14, saved=5 if sign == "saved" else None)
    elif sign == "eval":
        (run / "eval").mkdir()
    elif sign == "rollbacks.jsonl":
        (run / sign).write_text("{}\n")
    written = names(run) - {"notes.txt"}
    set_aside_former(run, config("run.seed=1") if sign == "other configuration" else config())
    assert names(run) == {"former-1", "notes.txt"} and names(run / "former-1") == written
    assert f"what else that run left is in {run}/former-1" in caplog.text
    set_aside_former(run, config())
    assert names(run) == {"former-1", "notes.txt"}


def test_what_a_kill_interrupted_is_ended(run):
    moving = run / ".former.writing"
    moving.mkdir()
    (run / "audit").rename(moving / "audit")
    (run / "former-1").mkdir()
    set_aside_former(run, config())
    assert names(run) == {"former-1", "former-2", "notes.txt"}
    assert json.loads((run / "former-2" / "status.json").read_text())["state"] == "running"
    assert (run / "former-2" / "audit").is_dir()
