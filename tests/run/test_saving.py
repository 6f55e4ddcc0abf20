"""Saves that fail, one after the other, end a run whether they are made behind it or not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from largescale.config import load_config
from largescale.run.failures import TrainingStopped
from largescale.run.saving import MAX_FAILED_SAVES, Saving
from tests.helpers.commands import TINY

ENGINE = SimpleNamespace(state=lambda: {"model.x": torch.ones(3)}, until_update=lambda state: set(state))
"""Of an engine a save needs its state alone."""
LEASE = SimpleNamespace(number=0, verify=lambda: None, check=lambda: None)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("background", [True, False])
def test_three_failures_in_a_row_and_no_fewer(one_process, tmp_path, background):
    config = load_config(TINY, ["data.shards=x", f"checkpoint.background={background}"]).checkpoint
    checkpoints = tmp_path / "checkpoints"
    published: list[int] = []
    saving = Saving(
        config, checkpoints, lease=LEASE, device=torch.device("cpu"), mirror=None, published=published.append
    )

    def save(step: int, *, fails: bool) -> None:
        if not fails:
            saving.settle()  # or the failing save behind the run would find the folder again
        if fails == checkpoints.is_dir():
            checkpoints.rename(tmp_path / "away") if fails else checkpoints.unlink()
        if fails:
            checkpoints.touch()  # a file where the folder should be
        elif not checkpoints.is_dir():
            Path(tmp_path / "away").rename(checkpoints)
        saving.save(ENGINE, {"step": step}, final=False)
        if not background or not fails:
            saving.settle()

    checkpoints.mkdir()
    for step, fails in enumerate([True] * (MAX_FAILED_SAVES - 1) + [False] + [True] * (MAX_FAILED_SAVES - 1)):
        save(step, fails=fails)
    with pytest.raises(TrainingStopped, match="could not save: "):
        save(9, fails=True)
        saving.settle()
    assert published == [MAX_FAILED_SAVES - 1]


@pytest.mark.parametrize("background", [True, False])
def test_a_run_that_ends_after_a_failed_save_says_so(one_process, tmp_path, background):
    config = load_config(TINY, ["data.shards=x", f"checkpoint.background={background}"]).checkpoint
    checkpoints = tmp_path / "checkpoints"
    saving = Saving(
        config, checkpoints, lease=LEASE, device=torch.device("cpu"), mirror=None, published=lambda step: None
    )
    checkpoints.touch()  # a file where the folder should be
    saving.save(ENGINE, {"step": 1}, final=False)
    with pytest.raises(TrainingStopped, match="could not save: "):
        saving.settle(final=True)
    checkpoints.unlink()
    checkpoints.mkdir()
    saving.save(ENGINE, {"step": 2}, final=False)
    saving.settle(final=True)
