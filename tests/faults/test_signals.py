"""Signals and the end of the job's time: the run saves, leaves with its code, and can go on."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.conftest import run_python
from tests.distributed.test_pretrain_parity import TINY, pretrain
from tests.faults.runs import assert_same_end, log_of, rank_processes, started, wait_for_step

pytestmark = pytest.mark.distributed


def status(run) -> tuple[int, str]:
    result = run_python("-m", "largescale", "status", run, check=False)
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
    assert "stopped in order: stopped by" in log_of(run).read_text()
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


def test_it_saves_before_its_time_ends(tiny_overrides, tmp_path):
    limits = ["run.time_limit_s=100", "run.stop_before_s=99.999"]
    result = run_python("-m", "largescale", "pretrain", TINY, *tiny_overrides(*limits), check=False)
    assert result.returncode == 85
    assert "stopped in order: stopped by the end of its time after step 0, saved" in result.stderr
    code, line = status(tmp_path / "run")
    assert code == 85 and "stopped, 1 of 14 steps" in line and "newest checkpoint: step 1" in line
