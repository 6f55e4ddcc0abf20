from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.launcher import pretrain

STEPS = ["train.steps=60", "checkpoint.every_steps=8", "train.precision=fp32", "parallel.strategy=fsdp"]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, shard_folder, held_out_shards) -> tuple[list[str], Path]:
    """Overrides of a run of 60 steps on two ranks, and the folder where it ran through."""
    data = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}", *STEPS]
    run = tmp_path_factory.mktemp("faults") / "undisturbed"
    pretrain([*data, f"run.dir={run}"], 2)
    return data, run
