"""One run handed from strategy to strategy, each on another number of ranks: it goes on as where it came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.launcher import pretrain
from tests.helpers.runs import losses, sample_sets

pytestmark = pytest.mark.distributed

DIVISIBLE = [
    "train.global_batch=12",
    "data.streams=12",
    "method.queue=24",
    "train.steps=16",
    "optim.lr=0.02",
    "checkpoint.every_steps=4",
    "checkpoint.keep=9",
]
"""A batch that 1, 2, 3 and 4 ranks divide; 16 steps are an epoch of 200 samples."""

CHAINS = {
    "fp64": [("fsdp", 4), ("fairscale", 2), ("ddp", 1), ("fsdp", 3)],
    "fp32": [("fsdp", 4), ("zero3", 2), ("ddp", 1), ("fsdp", 3)],
}


def forget_checkpoints_after(run: Path, step: int) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("precision, tolerance", [("fp64", 1e-8), ("fp32", 1e-5)])
def test_a_run_is_handed_from_strategy_to_strategy(shard_folder, held_out_shards, tmp_path, precision, tolerance):
    run = tmp_path / "run"
    shared = [
        f"data.shards={shard_folder}",
        f"data.eval_shards={held_out_shards}",
        *DIVISIBLE,
        f"train.precision={precision}",
        f"run.dir={run}",
    ]
    before: list[float] = []
    for number, (strategy, ranks) in enumerate(CHAINS[precision]):
        forget_checkpoints_after(run, 4 * number)
        pretrain([*shared, f"parallel.strategy={strategy}"], ranks)
        after = losses(run)
        # What is compared is the hand-over: the same two steps by the strategy before and by this one.
        first = 4 * number
        assert len(after) == 16 and after[:first] == before[:first]
        if number:
            assert after[first : first + 2] == pytest.approx(before[first : first + 2], rel=tolerance), strategy
        before = after
    epoch = [key for keys in sample_sets(run).values() for key in keys]
    assert len(epoch) == len(set(epoch)) == 192
