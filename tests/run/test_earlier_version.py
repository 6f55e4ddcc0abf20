"""A run that an earlier version of the code began goes on as that version would have.

`tests/fixtures/run_before_contract` is tests/tiny.yaml, 10 steps in fp64 under fsdp on 2 ranks with gradients clipped,
as the version before the contract of methods wrote it: its checkpoint of step 4, all it logged, and in `end` its last
checkpoint.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.helpers.commands import ROOT
from tests.helpers.launcher import run_largescale
from tests.helpers.runs import final_state

FIXTURE = ROOT / "tests" / "fixtures" / "run_before_contract"
EXACT = ("loss", "grad_norm", "lr")


def test_it_goes_on_to_the_same_end(shard_folder, held_out_shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / "checkpoints", run / "checkpoints")
    run_largescale(
        "pretrain",
        FIXTURE / "config.yaml",
        f"run.dir={run}",
        "parallel.strategy=ddp",
        f"data.shards={shard_folder}",
        f"data.eval_shards={held_out_shards}",
    )
    expected = [json.loads(line) for line in (FIXTURE / "metrics.jsonl").read_text().splitlines()][4:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(expected) == 6
    for row, wanted in zip(rows, expected, strict=True):
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)  # signs are summed in float32
        assert [row[key] for key in EXACT] == pytest.approx([wanted[key] for key in EXACT], rel=1e-9)
    mine, theirs = final_state(run), final_state(FIXTURE / "end")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).norm() <= 1e-9 * tensor.norm(), name
