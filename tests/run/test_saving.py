"""Saves that fail, one after the other, end a run whether they are made behind it or not."""

from __future__ import annotations

import threading
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from largescale.checkpoint.folder import newest_first, publish
from largescale.checkpoint.saver import Saver
from largescale.config import load_config
from largescale.run.failures import TrainingStopped
from largescale.run.folder import RunFolder
from largescale.run.saving import MAX_FAILED_SAVES, Saving
from shards.ground.errors import InputError
from tests.helpers.commands import TINY

ENGINE = SimpleNamespace(state=lambda: {"model.x": torch.ones(3)}, until_update=lambda state: set(state))
"""Of an engine a save needs its state alone."""
LEASE = SimpleNamespace(number=0, verify=lambda: None, check=lambda: None)


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


def test_a_save_that_fails_behind_the_run_says_so_at_once(one_process, tmp_path, caplog):
    config = load_config(TINY, ["data.shards=x"]).checkpoint
    (tmp_path / "file").touch()
    words = {"lease": LEASE, "device": torch.device("cpu"), "mirror": None, "published": lambda step: None}
    saving = Saving(config, tmp_path / "file", **words)
    saving.save(ENGINE, {"step": 7}, final=False)
    saving.linger(60)
    assert "could not save step 7: " in caplog.text and "tries again" not in caplog.text  # it may be the last
    saving.settle()  # which counts it
    assert caplog.text.count("could not save") == 1


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


def test_a_save_under_way_is_published_though_the_steps_end_with_an_error(one_process, tmp_path, monkeypatch):
    leaving = threading.Event()
    linger = Saver.linger
    monkeypatch.setattr(Saver, "linger", lambda self, limit_s: (leaving.set(), linger(self, limit_s)))
    monkeypatch.setattr("largescale.checkpoint.saver.publish", lambda *words: (leaving.wait(), publish(*words)))
    run = RunFolder(load_config(TINY, ["data.shards=x", f"run.dir={tmp_path}"]), "", torch.device("cpu"), LEASE)
    with pytest.raises(InputError), run.watched():
        run.saving.save(ENGINE, {"step": 3}, final=False)
        raise InputError("the shards are away")
    assert [checkpoint.step for checkpoint in newest_first(run.checkpoints)] == [3]


def test_what_is_staged_is_not_kept_until_it_is_written(one_process, tmp_path, monkeypatch):
    """As where a strategy makes copies for a save: on a GPU they would be there twice."""
    left = threading.Event()
    saver = Saver(tmp_path, keep=1, keep_every=0, background=True, device=torch.device("cpu"))
    monkeypatch.setattr("largescale.checkpoint.saver.publish", lambda *words: (left.wait(60), publish(*words)))
    state = {"model.x": torch.ones(3)}
    copied = weakref.ref(state["model.x"])
    saver.save(state, {"step": 1}, until_update=set(state))
    saver.wait_staged()
    del state
    assert copied() is None
    left.set()
    saver.wait()


def test_half_a_copy_is_not_published(one_process, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    config = load_config(TINY, ["data.shards=x"]).checkpoint
    saving = Saving(config, tmp_path, lease=LEASE, device=torch.device("cpu"), mirror=None, published=lambda step: None)
    copy = saving._saver._copy
    monkeypatch.setattr(saving._saver, "_copy", lambda state: fails() if state else copy(state))
    saving.save(ENGINE, {"step": 1}, final=False)
    with pytest.raises(RuntimeError, match="CUDA error"):
        saving.wait_staged()
    saving.linger(60)
    assert not newest_first(tmp_path)


def test_exchanges_of_saving_wait_as_long_as_the_watchdog_allows(one_process, tmp_path):
    settings = ["data.shards=x", f"run.dir={tmp_path}", f"checkpoint.mirror=file://{tmp_path}/store"]
    for seconds, expected in ((0, timedelta(days=20)), (600, timedelta(minutes=30)), (7200, timedelta(hours=4))):
        config = load_config(TINY, [*settings, f"run.hang_timeout_s={seconds}"])
        saving = RunFolder(config, "", torch.device("cpu"), LEASE).saving
        for group in (saving._saver._group, saving._copier._group):
            timeout = group._get_backend(torch.device("cpu")).options._timeout
            assert timeout >= expected if seconds == 0 else timeout == expected
