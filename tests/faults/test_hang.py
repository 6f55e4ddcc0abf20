"""A rank that stops answering is named, every rank that lives writes its stacks, and torchrun starts again."""

from __future__ import annotations

import os
import signal

import pytest

from tests.helpers.runs import assert_same_end, log_of, rank_processes, started, wait_for_step

pytestmark = pytest.mark.distributed


def test_a_stopped_rank_is_named_and_the_run_goes_on(undisturbed, tmp_path):
    data, expected = undisturbed
    run = tmp_path / "run"
    overrides = [*data, f"run.dir={run}", "run.hang_timeout_s=8"]
    with started(overrides, run, launcher=("--max-restarts=1", "--shutdown-timeout=2")) as process:
        wait_for_step(process, run, 20)
        os.kill(rank_processes(process.pid)[1], signal.SIGSTOP)
        assert process.wait(120) == 0
    log = log_of(run).read_text()
    assert "[rank 0] error: no progress for 8 s: rank 1 does not answer (stopped, or its machine is gone)" in log
    stacks = run / "stacks" / "rank-00000.txt"
    assert "largescale/pretrain.py" in stacks.read_text() and "in _train" in stacks.read_text()
    stacks.unlink()
    stacks.parent.rmdir()
    assert_same_end(run, expected)
