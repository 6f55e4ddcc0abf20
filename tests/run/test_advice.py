"""What a run says when it cannot go on is done to the letter, and works."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import batch_norm

from largescale.checkpoint.folder import open_checkpoint
from largescale.cli import main
from largescale.config import DataConfig, free_keys, load_config
from largescale.data.stream import Stream
from largescale.distributed import start_ranks
from largescale.observe import waiting
from largescale.parallel.batchnorm import enough_rows
from largescale.pretrain import pretrain
from largescale.run.advice import after_bad_step, after_failed_saves, new_run
from largescale.run.failures import TrainingStopped
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

TINY = str(ROOT / "tests" / "tiny.yaml")
SETTING = re.compile(r"\b[a-z_]+(?:\.[a-z_]+)?=[^\s;,]*")
"""An override as the lines quote it."""


def saved(run: Path, *steps: int) -> Path:
    """A folder of checkpoints that have marks and nothing else."""
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        stamps = {"a.safetensors": {"size": 1, "sha256": "0"}}
        (folder / "progress.json").write_text(json.dumps({"step": step, "files": stamps}))
        assert open_checkpoint(folder) is not None
    return run / "checkpoints"


RATES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    "steps, step, trouble, more, expected",
    [
        ([], 3, "loss not finite on rank 0", [], ["optim.lr=0.12"]),
        ([], 3, "loss not finite on rank 0", ["train.precision=fp16"], ["optim.lr=0.12", "train.precision=fp32"]),
        ([], 4, "input views not finite on rank 0", [], ["checkpoint.every_steps=2", "train.max_rollbacks=3"]),
        # The rate is a quarter, or the one that the good weights last had.
        (
            [2, 3],
            5,
            "loss not finite on rank 0",
            [],
            ["init_from={run}", "run.dir={run}-2", "optim.lr=0.12", "train.max_rollbacks=3"],
        ),
        (
            [2],
            5,
            "gradient not finite on rank 1",
            [],
            ["init_from={run}", "run.dir={run}-2", "optim.lr=0.1", "train.max_rollbacks=3"],
        ),
        # Saved just before the bad step, weights may be bad themselves: those before are named.
        (
            [2, 4],
            4,
            "loss not finite on rank 0",
            [],
            ["init_from={run}/checkpoints/step-00000002", "run.dir={run}-2", "optim.lr=0.1"],
        ),
        ([4], 5, "input views not finite on rank 0", [], ["train.max_rollbacks=3"]),
    ],
)
def test_what_is_advised_after_a_bad_step(tmp_path, steps, step, trouble, more, expected):
    run = tmp_path / "run"
    config = load_config(TINY, ["data.shards=x", f"run.dir={run}", *more])
    line = after_bad_step(
        config, step=step, trouble=trouble, rates=RATES, checkpoints=saved(run, *steps), num_rollbacks=2
    )
    assert [text.rstrip(".)") for text in SETTING.findall(line)] == [text.format(run=run) for text in expected]


def test_a_new_run_gets_a_folder_that_is_free(tmp_path):
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    config = load_config(TINY, ["data.shards=x", f"run.dir={tmp_path}/run"])
    assert new_run(config) == f"init_from={tmp_path}/run run.dir={tmp_path}/run-3"
    config.checkpoint.mirror = "s3://bucket/run/"
    assert new_run(config).endswith("run.dir=" + f"{tmp_path}/run-3 checkpoint.mirror=s3://bucket/run-3")
    config.checkpoint.mirror = "s3://bucket/"
    assert new_run(config).endswith(" checkpoint.mirror=s3://bucket/run-3")


@pytest.mark.parametrize("run_dir", [".", "below/.."])
def test_a_run_in_the_working_directory_gets_a_folder_beside_it(tmp_path, monkeypatch, run_dir):
    monkeypatch.chdir(tmp_path)
    config = load_config(TINY, ["data.shards=x", f"run.dir={run_dir}"])
    assert new_run(config) == f"init_from={tmp_path} run.dir={tmp_path}-2"


@pytest.mark.slow
def test_a_run_that_began_with_weights_of_others(ends, tmp_path):
    run = [f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    assert ends(*run)[0] == 0
    weights = tmp_path / "weights.safetensors"
    assert main(["export", str(tmp_path / "run"), str(weights)]) == 0
    run = [f"run.dir={tmp_path / 'other'}", "train.steps=2", f"model.weights={weights}"]
    assert ends(*run)[0] == 0
    code, line = ends(*run, "optim.weight_decay=0.5")
    assert code == 2 and "start a new run from its weights: " in line and line.endswith(" model.weights=")
    code, line = ends(*run, "optim.weight_decay=0.5", *SETTING.findall(line.split("from its weights: ")[1]))
    assert code == 0 and "is complete: 2 steps" in line


def rows() -> list[dict[str, float]]:
    row = {"data_wait_s": 1.0, "augment_s": 0.0, "step_s": 1.0, "read_ms": 1.0, "decode_ms": 2.0, "crop_ms": 1.0}
    return [row, {**row, "read_ms": 9.0}, {**row, "read_ms": 9.0, "cache_hit_rate": 0.1}]


def test_what_is_advised_while_a_run_waits_may_be_changed_in_it():
    lines = [waiting.advice(row, DataConfig(), (2, 2)) for row in rows()]
    keys = set(re.findall(r"\b[a-z]+\.[a-z_]+\b", " ".join(lines)))
    assert keys == {"data.fetches", "data.cache_gb", "data.workers"}
    free = free_keys(load_config(TINY, ["data.shards=unused"]))
    assert keys <= free
    assert "data.max_pixels" in free and "optim.lr" not in free


def test_what_is_advised_first_may_be_changed_in_a_run_that_goes_on(monkeypatch):
    config = load_config(TINY, ["data.shards=x", "parallel.sync_batchnorm=false"])
    monkeypatch.setattr("largescale.parallel.batchnorm.world_size", lambda: 8)
    with pytest.raises(InputError) as alone, enough_rows(config):
        batch_norm(torch.ones(1, 2), None, None, training=True)
    for line in (str(alone.value).partition("; ")[2], start_ranks._WHY[signal.SIGKILL]):
        now, _, later = line.partition("for a new run")
        assert "fewer ranks" in now and "train.global_batch" in later
        assert set(re.findall(r"\b[a-z]+\.[a-z_]+\b", now)) <= free_keys(config), line


@pytest.fixture
def ends(shard_folder, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit code and its last line."""

    def run(*overrides: str) -> tuple[int, str]:
        code = main(
            ["pretrain", TINY, f"data.shards={shard_folder}", "train.precision=fp32", "data.audit=false", *overrides]
        )
        return code, capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.slow
def test_a_rate_that_is_too_high(ends, shard_folder, tmp_path):
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        "optim.name=sgd",
        "optim.warmup_epochs=0.4",
        "optim.warmup_lr=0.001",
        "checkpoint.every_steps=1",
        "train.steps=4",
    ]
    config = load_config(TINY, [f"data.shards={shard_folder}", "train.precision=fp32", "data.audit=false", *overrides])
    config.optim.lr = 1e30  # no recipe's: it must break in a step
    with pytest.raises(TrainingStopped, match="step 2: loss not finite") as stopped:
        pretrain(config)
    code, line = ends(*overrides, *SETTING.findall(str(stopped.value).split("run the same command with")[1]))
    assert code == 0 and f"{tmp_path}/run-2 is complete: 4 steps" in line


@pytest.mark.slow
def test_images_that_are_not_finite(ends, tmp_path, monkeypatch):
    clean = Stream._images

    def poisoned(self, data_steps):
        for batch in clean(self, data_steps):
            if batch.step == 2:
                batch.views[0][0, 0, 0, 0] = float("nan")
            yield batch

    monkeypatch.setattr(Stream, "_images", poisoned)
    run = [f"run.dir={tmp_path / 'run'}", "checkpoint.every_steps=2", "train.steps=3", "train.rollback_window=1"]
    code, line = ends(*run)
    assert code == 3 and "input views not finite" in line
    code, line = ends(*run, *SETTING.findall(line.split("run the same command with")[1]))
    assert code == 0 and "is complete: 3 steps" in line


def test_room_is_asked_for_where_there_is_none():
    assert after_failed_saves("a: No space left on device (rank 0)").startswith("make room there")
    unshared = "a/b, which a rank has written, is not there on rank 0; do all nodes share run.dir? (rank 0)"
    assert after_failed_saves(unshared) == "fix that and run the same command again"
