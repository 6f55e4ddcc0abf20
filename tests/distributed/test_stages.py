"""Runs of several stages, in which steps have other objectives than before: layers that learn one by one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from largescale.__main__ import main
from largescale.parallel.engine import Engine
from tests.helpers.commands import ROOT
from tests.helpers.launcher import run_largescale
from tests.helpers.runs import losses, steps_saved

pytestmark = pytest.mark.distributed

STEPS = 12
"""Four for each of three layers: stages begin with steps 4 and 8."""


def command(shards: Path, run: Path, *overrides: str) -> list[str]:
    """AdamW counts steps for each parameter, and those of layers that have not begun are none."""
    return [
        "pretrain",
        str(ROOT / "tests/methods/mini/denoising.yaml"),
        f"data.shards={shards}",
        f"run.dir={run}",
        "method.layers=one_by_one",
        "optim.name=adamw",
        "optim.lr=0.01",
        f"train.steps={STEPS}",
        "run.log_every=1",
        "checkpoint.every_steps=1",
        "checkpoint.keep=99",
        "checkpoint.background=false",
        *overrides,
    ]


def main_that_is_killed_in_the_second_stage() -> int:
    """The command, killed when it is to train on step 6."""
    forward_backward = Engine.forward_backward

    def train_or_die(self: Engine, views: Any, step: int, objective: str) -> Any:
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_backward(self, views, step, objective)

    Engine.forward_backward = train_or_die  # type: ignore[method-assign]  # of a process that is about to end
    return main()


def go_back_to(run: Path, last: int) -> None:
    """As if the run had been stopped there."""
    for step in steps_saved(run):
        if step > last:
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")


def test_a_run_goes_on_within_a_stage_and_between_two_with_other_ranks(shard_folder, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_largescale(*command(shard_folder, whole, "parallel.strategy=fsdp"), ranks=2)
    before = losses(whole)
    assert len(before) == STEPS
    killed = run_largescale(
        *command(shard_folder, run, "parallel.strategy=ddp"),
        ranks=2,
        check=False,
        entry=main_that_is_killed_in_the_second_stage,
    )
    assert killed.returncode != 0 and max(steps_saved(run)) == 6, killed.stderr
    for last, strategy, ranks in ((6, "ddp", 1), (8, "fsdp", 2), (4, "fairscale", 1)):
        go_back_to(run, last)
        run_largescale(*command(shard_folder, run, f"parallel.strategy={strategy}"), ranks=ranks)
        assert losses(run) == pytest.approx(before, rel=1e-8), (last, strategy, ranks)


def test_with_batchnorm_of_its_own_on_each_rank_a_run_goes_on_as_it_was(shard_folder, tmp_path):
    """Layers that have learnt are used by their running statistics."""
    run = tmp_path / "run"
    shared = command(shard_folder, run, "parallel.sync_batchnorm=false")
    run_largescale(*shared, ranks=2)
    before = losses(run)
    for last in (8, 6):
        go_back_to(run, last)
        run_largescale(*shared, ranks=2)
        assert losses(run) == pytest.approx(before, rel=1e-9), last
