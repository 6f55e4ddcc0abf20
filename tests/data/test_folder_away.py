"""A shard folder that is away for a moment is waited for, and a lost shard is tried again.

Covers: largescale/data/patience.py
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

import pytest

from largescale.data import patience, reader
from largescale.data.cache import ShardLost
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError


@pytest.fixture
def folder(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "shards"))


def make_reader(folder: Path, patience_s: float) -> ShardReader:
    return ShardReader([Corpus(read_manifest(folder), patience_s=patience_s)])


def test_a_folder_that_is_away_for_a_moment_costs_no_sample(folder, monkeypatch, caplog):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(patience, "_SPEAKS_AFTER_S", 0.0)
    waiting = threading.Event()
    samples = make_reader(folder, 60)
    samples.status = lambda text: waiting.set() if text == f"waiting for {folder}" else None
    expected = bytes(samples.read(0).payload)
    away = folder.rename(folder.with_name("away"))

    def bring_back() -> None:
        waiting.wait(30)
        time.sleep(0.2)
        away.rename(folder)

    thread = threading.Thread(target=bring_back)
    thread.start()
    with caplog.at_level(logging.WARNING):
        late = bytes(samples.read(50).payload)
    thread.join()
    assert waiting.is_set() and f"{folder}: away for" in caplog.text
    fresh = make_reader(folder, 0)
    assert late == bytes(fresh.read(50).payload) and expected == bytes(fresh.read(0).payload)


def test_a_folder_that_stays_away_ends_with_a_line(folder, monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)
    samples = make_reader(folder, 0.05)
    folder.rename(folder.with_name("away"))
    with pytest.raises(InputError, match=r"shards: away for \d+ s .*raise data\.store_patience_s=0\.05") as error:
        samples.read(0)
    assert not isinstance(error.value, ShardLost)


def test_a_lost_shard_is_tried_again_later(folder, monkeypatch, caplog):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.01)
    clock = [1000.0]
    monkeypatch.setattr(reader.time, "monotonic", lambda: clock[0])
    samples = make_reader(folder, 60)
    tar = samples.corpora[0].manifest.tar_path(1)
    tar.rename(tar.with_suffix(".away"))
    for now, attempts in ((1000, 3), (1060, 1), (1180, 1)):  # after a minute, then after two
        clock[0] = now
        for _ in range(2):
            with pytest.raises(ShardLost, match=f"No such file.*after {attempts} attempts"):
                samples.read(45)
    tar.with_suffix(".away").rename(tar)
    with pytest.raises(ShardLost):
        samples.read(45)
    clock[0] = 1180 + 240
    with caplog.at_level(logging.WARNING):
        assert samples.read(45).payload
    assert f"{tar}: is back" in caplog.text and samples.read(46).payload
