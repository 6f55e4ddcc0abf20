"""A rank is killed in the middle; the same command again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import find_latest
from tests.conftest import ROOT
from tests.distributed.test_pretrain_parity import pretrain, sample_sets

pytestmark = pytest.mark.distributed

STEPS = ["train.steps=60", "checkpoint.every_steps=8", "train.precision=fp32", "parallel.strategy=fsdp"]
TIMES = {"images_per_s", "data_wait_s", "step_s", "peak_memory_bytes"}


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 60
    state = {name: torch.zeros(shape) for name, shape in sharded.shapes(checkpoint).items()}
    sharded.load(checkpoint, state, no_dist=True)
    return state


def start_and_kill(overrides: list[str], run: Path, at_step: int) -> None:
    """Start two ranks, and kill -9 the second one once it has trained on `at_step`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "largescale",
               "pretrain", str(ROOT / "tests" / "tiny.yaml"), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        audit = run / "audit" / "rank-00001.jsonl"
        deadline = time.monotonic() + 120
        while not audit.exists() or len(audit.read_text().splitlines()) <= at_step:
            assert process.poll() is None and time.monotonic() < deadline, "the run ended before it was killed"
            time.sleep(0.01)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        assert process.wait(60) != 0


def rank_process(launcher: int, rank: int) -> int:
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shard_folder, test_shard_folder) -> tuple[list[str], Path]:
    data = [f"data.shards={shard_folder}", f"data.eval_shards={test_shard_folder}", *STEPS]
    run = tmp_path_factory.mktemp("kill") / "undisturbed"
    pretrain([*data, f"run.dir={run}"], 2)
    return data, run


def test_same_ranks_end_bit_for_bit_as_the_undisturbed_run(undisturbed, tmp_path):
    data, expected = undisturbed
    run = tmp_path / "run"
    overrides = [*data, f"run.dir={run}"]
    start_and_kill(overrides, run, at_step=20)
    assert 0 < find_latest(run / "checkpoints").step < 60
    pretrain(overrides, 2)
    assert metrics(run) == metrics(expected)
    for rank in range(2):
        name = f"audit/rank-{rank:05d}.jsonl"
        assert (run / name).read_text() == (expected / name).read_text()
    mine, theirs = final_state(run), final_state(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert any(name.startswith("optimizer.") for name in mine) and "extra.queue" in mine
    assert not [path for path in run.rglob("*.writing")]


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
