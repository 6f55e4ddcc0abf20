"""Small shards, many of which are read at a time: each is opened once, within the limit of descriptors."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from largescale.data import reader
from largescale.data.corpora import Corpus
from largescale.data.kept_shards import LEAST_KEPT, KeptShards
from largescale.data.reader import ShardReader
from shards.conversion.convert import Options, convert
from shards.format.manifest import Manifest
from shards.format.shard_index import ShardIndex
from shards.ground.open_file import OpenFile

NUM_SHARDS = 100


@pytest.fixture(scope="module")
def small(sample_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Shards of two samples."""
    manifest = convert(
        sample_images / "train", tmp_path_factory.mktemp("small") / "out", Options("small", samples_per_shard=2)
    )
    assert manifest is not None and len(manifest.shards) == NUM_SHARDS
    return manifest


@pytest.mark.parametrize("limit, most_tars", [(2**20, NUM_SHARDS), (1024, NUM_SHARDS), (512, 64), (100, 64)])
def test_each_index_is_read_once_and_descriptors_are_bounded(small, monkeypatch, limit, most_tars):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    num_read, opened, read_index = [], [], reader.read_index

    def count(path: Path):
        num_read.append(path)
        return read_index(path)

    class Counted(OpenFile):
        def __init__(self, path: Path) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(reader, "read_index", count)
    monkeypatch.setattr(reader, "OpenFile", Counted)
    samples = ShardReader([Corpus(small)])
    for turn in range(3):
        for shard in range(NUM_SHARDS):
            samples.read(2 * shard + turn % 2)
            assert len(samples._kept.tars) <= most_tars
    assert len(num_read) == NUM_SHARDS
    assert len(opened) == (NUM_SHARDS if most_tars == NUM_SHARDS else 3 * NUM_SHARDS)


class Told(ShardIndex):
    """An index of so many frames in two clips."""

    def __init__(self, num_frames: int) -> None:
        object.__setattr__(self, "offset", np.zeros(2))
        object.__setattr__(self, "clips", SimpleNamespace(offset=range(num_frames)))


@pytest.mark.parametrize(
    "num_frames, expected", [(100_000, LEAST_KEPT), (10_000, 64), (1000, 640), (64_000, LEAST_KEPT)]
)
def test_indexes_are_bounded_by_images_and_frames(small, num_frames, expected):
    kept, tar = KeptShards(), OpenFile(small.tar_path(0))
    for shard in range(700):
        kept.add(shard, tar, Told(num_frames))
    for shard in range(600, 700):
        kept.add(shard, tar, Told(num_frames))  # again, as after its tar was closed
    assert list(kept.indexes) == list(range(700 - expected, 700)) and kept._num_images == expected * num_frames
    assert kept.get(699) is not None and kept.get(0) is None


def test_those_used_longest_ago_are_dropped(small):
    kept, tar = KeptShards(), OpenFile(small.tar_path(0))
    for shard in range(64):
        kept.add(shard, tar, Told(10_000))
    kept.get(0)
    kept.add(64, tar, Told(10_000))
    assert kept.get(0) is not None and kept.get(1) is None
