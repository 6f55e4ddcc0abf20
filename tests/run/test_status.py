"""What `largescale status` says of runs that go on, ended, or were killed."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from largescale.cli import main
from largescale.distributed.stopping import StoppedInOrder, StoppedWaiting
from largescale.run.lease import take_folder
from largescale.run.owner import owner_path, parse_owner
from largescale.run.start import start_in_status
from largescale.run.status import read_status, status_of, write_status
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT


@pytest.fixture
def owned(tmp_path):
    """A run under way: its folder, and its lease."""
    lease = take_folder(tmp_path, lease_s=20, wait_s=0)
    write_status(tmp_path, "running", 0, 100)
    yield tmp_path, lease
    lease.release()


def change(run: Path, **values: object) -> None:
    path = owner_path(run, 1)
    path.write_bytes(replace(parse_owner(path.read_bytes()), **values).to_bytes())


def log(run: Path, *steps: int, cut: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + cut)


def test_progress_while_it_runs(owned):
    run, lease = owned
    assert str(status_of(run)).startswith("running, 0 of 100 steps; newest checkpoint: none; process ")
    log(run, *range(20000), cut='{"step": 30')
    assert status_of(run).step == 20000
    lease.step = 20031  # past the last logged one
    lease.verify()
    assert (status_of(run).state, status_of(run).step) == ("running", 20031)


def test_not_running_once_its_process_is_gone(owned):
    run, _ = owned
    change(run, process_start=1, time=0.0, step=7)
    status = status_of(run)
    assert (status.state, status.step) == ("not running", 7) and str(status).startswith("not running since 19")
    assert "is gone" in status.why


def test_of_another_machine_signs_of_life_count_whatever_its_clock_says(owned):
    run, lease = owned
    lease.release()  # no renewals but those below
    path = owner_path(run, 1)
    elsewhere = replace(lease._owner, machine="elsewhere", host="n7", lease_s=1.0)

    def state(shift_s: float, *, renewed: bool) -> str:
        path.write_bytes(replace(elsewhere, time=time.time() + shift_s).to_bytes())
        stop = threading.Event()

        def renew() -> None:
            number = 0
            while not stop.wait(0.05):
                number += 1
                path.write_bytes(replace(elsewhere, time=time.time() + shift_s, renewals=number).to_bytes())

        thread = threading.Thread(target=renew if renewed else stop.wait)
        thread.start()
        try:
            return str(status_of(run))
        finally:
            stop.set()
            thread.join()

    assert state(0, renewed=False).startswith("running")
    for hours in (-2, 2):
        assert state(hours * 3600, renewed=True).startswith("running")
        dead = state(hours * 3600, renewed=False)
        assert dead.startswith("not running since") and "on n7" in dead and "by its own clock" in dead


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"token": 1}',
        b"[" * 9999,
        {"time": 1e300},
        {"time": math.inf},
        {"time": 10**400},
        {"lease_s": 1e9},
        {"pid": "a"},
    ],
)
def test_a_file_of_an_owner_that_is_damaged_is_nobodys(owned, content):
    run, lease = owned
    values = {**asdict(lease._owner), **content} if isinstance(content, dict) else {}
    owner_path(run, 1).write_bytes(json.dumps(values).encode() if values else content)
    assert parse_owner(owner_path(run, 1).read_bytes()) is None
    assert status_of(run).state == "not running"


def test_what_it_said_at_its_end_counts_even_if_its_lease_was_left(owned):
    run, _ = owned
    write_status(run, "complete", 100, 100)
    change(run, process_start=1)
    assert status_of(run).state == "complete"


def test_without_a_word_or_an_owner_it_does_not_run(tmp_path):
    write_status(tmp_path, "running", 3, 100)
    log(tmp_path, 0, 1, 2, 3, 4)
    assert (status_of(tmp_path).state, status_of(tmp_path).step) == ("not running", 5)


def test_exit_codes(tmp_path, capsys):
    recipe = [str(ROOT / "tests" / "tiny.yaml"), "data.shards=x", f"run.dir={tmp_path / 'run'}"]
    assert main(["status", *recipe]) == 85
    assert capsys.readouterr().out.startswith(f"{tmp_path}/run: not started; newest check")
    for path in (tmp_path, tmp_path / "nothing"):
        assert main(["status", str(path)]) == 2
        assert "no run here; pass the folder that pretrain wrote, or its recipe" in capsys.readouterr().err
    write_status(tmp_path / "run", "complete", 3, 3)
    assert main(["status", *recipe]) == 0 and main(["status", str(tmp_path / "run")]) == 0
    (tmp_path / "run" / "status.json").write_text("{")
    assert main(["status", *recipe]) == 2


def test_a_start_that_ends_before_its_first_step_is_in_the_status(tmp_path):
    lease = take_folder(tmp_path, lease_s=20, wait_s=0)

    def start(error: BaseException) -> str:
        with pytest.raises(type(error)), start_in_status(lease):
            raise error
        row = read_status(tmp_path)
        return f"{row['state']} {row['step']}/{row['steps']} {row.get('reason', '')}"

    try:
        with pytest.raises(InputError), start_in_status(lease):
            raise InputError("a typing error")
        assert not (tmp_path / "status.json").exists()
        assert start(ZeroDivisionError("x")) == "failed 0/0 ZeroDivisionError: x"
        write_status(tmp_path, "running", 7, 100, saved=5)  # by one that was killed
        assert start(InputError("optim.lr was 1 and is now 2")) == "failed 7/100 optim.lr was 1 and is now 2"
        assert start(KeyboardInterrupt()) == "stopped 7/100 interrupted"
        write_status(tmp_path, "running", 7, 100, saved=5)  # rank 0 has not written yet that all stopped
        assert start(StoppedInOrder("stopped after step 14 at another rank's request")) == "running 7/100 "
        assert start(StoppedWaiting("stopped by SIGTERM while waiting for data")).startswith("stopped 7/100 stopped by")
        write_status(tmp_path, "complete", 100, 100)
        assert start(InputError("optim.lr was 1 and is now 2")).startswith("complete 100/100")
        write_status(tmp_path, "stopped", 7, 100)
        with pytest.raises(ZeroDivisionError), start_in_status(lease):
            write_status(tmp_path, "failed", 9, 100, reason="told by the steps")
            raise ZeroDivisionError
        assert read_status(tmp_path)["reason"] == "told by the steps"
    finally:
        lease.release()
