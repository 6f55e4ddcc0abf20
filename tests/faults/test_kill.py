"""Ranks are killed; the same command again ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from largescale.checkpoint.folder import find_latest
from tests.faults.kills import kill_again_and_again
from tests.helpers.launcher import pretrain
from tests.helpers.runs import assert_same_end, metrics, rank_processes, sample_sets, started, wait_for_step

pytestmark = pytest.mark.distributed


def start_and_kill(overrides: list[str], run: Path, at_step: int) -> None:
    """Start two ranks, and kill -9 the second one once it has trained on `at_step`."""
    with started(overrides, run) as process:
        wait_for_step(process, run, at_step)
        os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
        assert process.wait(60) != 0


def test_same_ranks_end_bit_for_bit_as_the_undisturbed_run(undisturbed, tmp_path):
    data, expected = undisturbed
    run = tmp_path / "run"
    overrides = [*data, f"run.dir={run}"]
    start_and_kill(overrides, run, at_step=20)
    assert 0 < find_latest(run / "checkpoints").step < 60
    pretrain(overrides, 2)
    assert_same_end(run, expected)


def test_other_ranks_go_on_with_the_same_samples(undisturbed, tmp_path):
    data, expected = undisturbed
    run = tmp_path / "run"
    overrides = [*data, f"run.dir={run}"]
    start_and_kill(overrides, run, at_step=12)
    pretrain([*overrides, "parallel.strategy=ddp"], 4)
    assert sample_sets(run) == sample_sets(expected)
    assert [row["step"] for row in metrics(run)] == list(range(60))


def test_a_complete_run_is_left_alone(undisturbed):
    data, run = undisturbed
    before = (run / "metrics.jsonl").read_bytes()
    pretrain([*data, f"run.dir={run}"], 2)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_torchrun_starts_again_from_the_last_checkpoint(undisturbed, tmp_path):
    data, expected = undisturbed
    run = tmp_path / "run"
    with started([*data, f"run.dir={run}"], run, launcher=("--max-restarts=2",)) as process:
        wait_for_step(process, run, 20)
        os.kill(rank_processes(process.pid)[0], signal.SIGKILL)
        assert process.wait(120) == 0
    assert_same_end(run, expected)


def test_kills_at_random_moments(shard_folder, held_out_shards, tmp_path):
    data = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}"]
    assert kill_again_and_again(data, tmp_path, num_kills=3, seed=0, steps=60)["kills"] == 3
