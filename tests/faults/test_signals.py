"""Signals and the end of the job's time: the run saves, leaves with its code, and can go on.

Covers: largescale/distributed/stopping.py, largescale/run/status_file.py
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from largescale.__main__ import main
from largescale.checkpoint.folder import Checkpoint
from largescale.checkpoint.mirror import Mirror
from tests.helpers.commands import TINY, environment
from tests.helpers.launcher import pretrain, run_largescale
from tests.helpers.runs import assert_same_end, log_of, rank_processes, started, wait_for_step

pytestmark = pytest.mark.distributed


def status(run) -> tuple[int, str]:
    result = run_largescale("status", run, check=False)
    return result.returncode, result.stdout


@pytest.mark.parametrize("number, whom", [(signal.SIGUSR2, "rank 0"), (signal.SIGTERM, "torchrun")])
def test_a_signal_to_any_rank_stops_all_of_them_in_order(undisturbed, tmp_path, number, whom):
    data, expected = undisturbed
    run = tmp_path / "run"
    overrides = [*data, f"run.dir={run}"]
    with started(overrides, run) as process:
        wait_for_step(process, run, 13)
        ranks = rank_processes(process.pid)
        os.kill(process.pid if whom == "torchrun" else ranks[int(whom[-1])], number)
        assert process.wait(60) != 0
    assert "stopped in order: stopped " in log_of(run).read_text()
    stopped = json.loads((run / "status.json").read_text())
    assert stopped["state"] == "stopped" and 13 < stopped["step"] < 60
    assert (run / "checkpoints" / "latest").read_text() == f"step-{stopped['step']:08d}\n"
    assert status(run)[0] == 85
    pretrain(overrides, 2)
    assert status(run)[0] == 0
    assert_same_end(run, expected)


def test_where_torchrun_may_restart_it_is_not_made_to(undisturbed, tmp_path):
    data, _ = undisturbed
    run = tmp_path / "run"
    with started([*data, f"run.dir={run}"], run, launcher=("--max-restarts=3",)) as process:
        wait_for_step(process, run, 13)
        os.kill(rank_processes(process.pid)[1], signal.SIGUSR1)
        assert process.wait(60) == 0
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


def test_ctrl_c_once_stops_in_order_and_twice_at_once(tiny_overrides, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    overrides = tiny_overrides("train.steps=100000", "data.workers=2", "checkpoint.every_steps=0")
    # A launcher may pass on what the terminal has sent already: that is no second time.
    assert interrupt(overrides, log, run, [0.0, 0.1]) == 85
    says = r"stopped in order: stopped after step \d+ by Ctrl-C; checkpoint saved"
    assert re.fullmatch(says, log.read_text().splitlines()[-1])
    stopped = json.loads((run / "status.json").read_text())
    assert stopped["state"] == "stopped" and (run / "checkpoints" / f"step-{stopped['step']:08d}").is_dir()

    # While a loader process stands still and no step can end.
    def stall(process):
        os.kill(first_child(process.pid), signal.SIGSTOP)
        seen = 0  # until the batches that were made ahead are used up
        while seen < (seen := (run / "metrics.jsonl").stat().st_size):
            time.sleep(2)

    assert interrupt(overrides, log, run, [0.5, 1.5], before=stall) == 130
    assert log.read_text().splitlines()[-2:] == [
        "stopping after this step, with a checkpoint; press Ctrl-C again to quit at once",
        "error: interrupted twice; the same command continues from the last checkpoint",
    ]
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"

    # On its way out, when all is said: there is nothing left to interrupt.
    def stop(process):
        os.kill(process.pid, signal.SIGUSR2)
        while "stopped in order" not in log.read_text():
            time.sleep(0.002)

    assert interrupt(overrides, log, run, [0.0, 0.01, 0.02, 0.02, 0.02], before=stop) == 85

    # During the start, when nothing is to be saved.
    assert interrupt(overrides, log, None, [0.2]) == 130
    assert log.read_text() == "error: interrupted\n"


def interrupt(overrides, log, run, pauses, before=lambda process: None) -> int:
    """Start a run, send Ctrl-C to all its processes after some pauses, once it trains if `run` is given; its code."""
    rows = run / "metrics.jsonl" if run else log
    known = rows.read_text().count("\n") if run and rows.exists() else 0
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "largescale", "pretrain", str(TINY), *overrides],
            stdout=file,
            stderr=file,
            env=environment(),
            start_new_session=True,
        ) as process,
    ):
        try:
            while not listens(process.pid) or (run and not has_rows(rows, known + 20)):
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            before(process)
            for pause in pauses:
                time.sleep(pause)
                os.killpg(process.pid, signal.SIGINT)
            return process.wait(60)
        finally:
            process.kill()
            assert "Traceback" not in log.read_text()


def has_rows(path: Path, count: int) -> bool:
    return path.exists() and path.read_text().count("\n") >= count


def listens(pid: int) -> bool:
    """Whether a process has set its handlers of signals."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def first_child(pid: int) -> int:
    """The first loader process of a run."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def copying_forever() -> int:
    """largescale, with a store that never answers rank 1."""
    copy_files = Mirror.copy_files

    def copy(self: Mirror, checkpoint: Checkpoint, part: int, parts: int) -> None:
        if part == 1:
            threading.Event().wait()
        copy_files(self, checkpoint, part, parts)

    Mirror.copy_files = copy
    return main()


def test_a_stop_does_not_wait_for_copies_without_end(tiny_overrides, tmp_path):
    limits = ["run.time_limit_s=8", "run.stop_before_s=7.999", f"checkpoint.mirror=file://{tmp_path}/store"]
    command = ["pretrain", TINY, *tiny_overrides(*limits)]
    result = run_largescale(*command, check=False, ranks=2, entry=copying_forever)
    assert result.returncode == 85, result.stderr
    assert "not all is copied to" in result.stderr and "Traceback" not in result.stderr
    assert status(tmp_path / "run")[0] == 85


def test_it_saves_before_its_time_ends(tiny_overrides, tmp_path):
    limits = ["run.time_limit_s=100", "run.stop_before_s=99.999"]
    result = run_largescale("pretrain", TINY, *tiny_overrides(*limits), check=False)
    assert result.returncode == 85
    assert "stopped in order: stopped after step 0 by its time limit; checkpoint saved" in result.stderr
    code, line = status(tmp_path / "run")
    assert code == 85 and "stopped, 1 of 14 steps" in line and "newest checkpoint: step 1" in line
