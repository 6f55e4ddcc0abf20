"""Offline phases in real runs: what comes of them is in checkpoints, on any number of ranks.

Covers: largescale/run/phases.py, largescale/methods/phase.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.launcher import run_largescale
from tests.helpers.runs import losses

pytestmark = pytest.mark.distributed

MINI = ROOT / "tests/methods/mini/pcl.yaml"
STEPS = 26
"""12 are an epoch of 200 images; with an epoch of warm-up, phases come before steps 12 and 24."""


def steps_saved(run: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")}


def test_a_run_is_stopped_within_an_epoch_or_a_phase_and_goes_on_with_other_ranks(shard_folder, tmp_path):
    run = tmp_path / "run"
    shared = [
        "pretrain",
        str(MINI),
        f"data.shards={shard_folder}",
        f"run.dir={run}",
        "run.log_every=1",
        f"train.steps={STEPS}",
        "method.warmup_epochs=1",
        "method.recluster_epochs=1",
        "optim.lr=0.02",
        "evaluate.resize=24",
        "evaluate.size=24",
        "evaluate.batch=32",
        "checkpoint.every_steps=9",
        "checkpoint.keep=9",
    ]
    run_largescale(*shared, "parallel.strategy=fsdp", ranks=2)
    before = losses(run)
    assert steps_saved(run) == {9, 12, 18, 24, 26}  # also before each phase
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "phase_s" in row] == [12, 24]
    assert all(0 < row["clusters_used_9"] <= 1 for row in rows if "phase_s" in row)
    for stop, strategy, ranks in ((18, "ddp", 1), (24, "ddp", 2)):
        for step in steps_saved(run):
            if step > stop:
                shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
        run_largescale(*shared, f"parallel.strategy={strategy}", ranks=ranks)
        assert losses(run) == pytest.approx(before, rel=1e-8), stop
