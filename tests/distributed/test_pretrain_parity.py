"""The real command on 1, 2 and 4 ranks, under each strategy and number of loader workers: the same run.

Covers: largescale/models/compile.py, largescale/parallel/offload.py, largescale/pretrain.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from largescale.checkpoint.export import export
from tests.helpers.launcher import pretrain
from tests.helpers.runs import losses, sample_sets

pytestmark = pytest.mark.distributed

VARIANTS = [  # ranks, strategy, loader workers
    (1, "ddp", 1),
    (1, "fsdp", 0),
    (2, "ddp", 3),
    (2, "fsdp", 0),
    (2, "fsdp", 1),
    (4, "ddp", 0),
    (4, "fsdp", 3),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, shard_folder, held_out_shards) -> tuple[list[str], Path]:
    """Overrides that name the data, and the run of one rank that loads in its own process."""
    data = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}"]
    run = tmp_path_factory.mktemp("parity") / "reference"
    pretrain([*data, f"run.dir={run}"])
    return data, run


@pytest.mark.parametrize("ranks, strategy, workers", VARIANTS)
def test_losses_agree_to_1e_8_in_float64_and_steps_hold_the_same_samples(reference, tmp_path, ranks, strategy, workers):
    data, expected = reference
    run = tmp_path / "run"
    pretrain([*data, f"run.dir={run}", f"parallel.strategy={strategy}", f"data.workers={workers}"], ranks)
    assert len(losses(expected)) == 14  # more than one epoch of 12 steps
    assert losses(run) == pytest.approx(losses(expected), rel=1e-8)
    assert sample_sets(run) == sample_sets(expected)


@pytest.mark.parametrize("ranks, strategy", [(2, "ddp"), (4, "fsdp")])
def test_the_first_two_losses_agree_to_1e_5_in_float32(reference, tmp_path, ranks, strategy):
    data, _ = reference
    one, several = tmp_path / "one", tmp_path / "several"
    shared = [*data, "train.precision=fp32", "train.steps=2"]
    pretrain([*shared, f"run.dir={one}"])
    pretrain([*shared, f"run.dir={several}", f"parallel.strategy={strategy}"], ranks)
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)


@pytest.fixture(scope="module")
def in_float32(reference, tmp_path_factory) -> tuple[list[str], list[float], Path]:
    """Overrides of a calm run in fp32, its losses under DDP on two ranks, and its folder."""
    data, _ = reference
    overrides = [*data, "train.precision=fp32", "optim.lr=0.02", "method.queue=0", "train.steps=8"]
    run = tmp_path_factory.mktemp("float32") / "run"
    pretrain([*overrides, f"run.dir={run}"], 2)
    return overrides, losses(run), run


@pytest.mark.parametrize(
    "strategy, precision",
    [("ddp", "bf16"), ("fsdp", "bf16"), ("zero2", "bf16"), ("fairscale", "bf16"), ("ddp", "fp16")],
)
def test_half_precision_stays_near_float32(in_float32, tmp_path, strategy, precision):
    overrides, expected, _ = in_float32
    run = tmp_path / "run"
    pretrain([*overrides, f"run.dir={run}", f"parallel.strategy={strategy}", f"train.precision={precision}"], 2)
    assert losses(run)[:2] == pytest.approx(expected[:2], rel=0.03)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # From 2^16 down by half with each update that is skipped; each row is a step here.
    scale = 2.0**16
    for row in rows if precision == "fp16" else []:
        scale /= 2 ** row["updates_skipped"]
        assert row["updates_skipped"] in (0, 1) and row["loss_scale"] == scale
    assert precision == "fp16" or not any("loss_scale" in row for row in rows)


def test_micro_batches_and_recomputation_do_not_depend_on_the_ranks(reference, tmp_path):
    data, _ = reference
    shared = [*data, "train.accumulate=2", "model.recompute_stages=[1]", "train.steps=3"]
    pretrain([*shared, f"run.dir={tmp_path / 'one'}"])
    pretrain([*shared, f"run.dir={tmp_path / 'two'}", "parallel.strategy=fsdp"], 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-8)
    assert sample_sets(tmp_path / "two") == sample_sets(tmp_path / "one")


def test_compiled_blocks_change_nothing(reference, tmp_path):
    data, run = reference
    pretrain([*data, f"run.dir={tmp_path}", "parallel.strategy=fsdp", "model.compile_stages=[2]"], 2)
    assert losses(tmp_path) == pytest.approx(losses(run), rel=1e-8)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_offloading_to_the_host_changes_nothing(in_float32, tmp_path, strategy):
    overrides, expected, _ = in_float32
    run = tmp_path / "run"
    pretrain([*overrides, f"run.dir={run}", f"parallel.strategy={strategy}", "parallel.cpu_offload=true"], 2)
    assert losses(run)[:3] == pytest.approx(expected[:3], rel=1e-5)


@pytest.mark.parametrize(
    "first, then", [("zero2", "fsdp"), ("fsdp", "zero3"), ("zero3", "fairscale"), ("fairscale", "zero1")]
)
def test_a_run_goes_on_under_another_strategy(in_float32, tmp_path, first, then):
    overrides, expected, ddp = in_float32
    run = tmp_path / "run"
    pretrain([*overrides, f"run.dir={run}", f"parallel.strategy={first}"], 2)
    # As if it had been stopped after its first checkpoint.
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    pretrain([*overrides, f"run.dir={run}", f"parallel.strategy={then}"], 2)
    assert losses(run) == pytest.approx(expected, rel=1e-4)
    # Whichever strategies trained it, plain torch gets the same backbone.
    ours, theirs = (
        load_file(export(folder, tmp_path / f"{number}.safetensors").path) for number, folder in enumerate((run, ddp))
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-3, msg=name)


def test_every_epoch_uses_every_sample_once_but_for_less_than_a_batch(reference):
    _, run = reference
    first_epoch = [key for step, keys in sample_sets(run).items() if step < 12 for key in keys]
    assert len(first_epoch) == len(set(first_epoch)) == 192
