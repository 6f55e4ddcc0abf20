"""A shard folder as a sequence: each image as it was, wherever the folder is."""

from __future__ import annotations

import shutil

import fsspec
import pytest

from shards.ground.errors import InputError
from shards.inspection.shard_folder import ShardFolder
from shards.stores.store import ALLOW_PIPE


@pytest.fixture(scope="module")
def folder(shard_folder) -> ShardFolder:
    return ShardFolder(shard_folder)


@pytest.fixture(scope="module")
def stored(shard_folder) -> ShardFolder:
    memory = fsspec.filesystem("memory")
    memory.put(str(shard_folder), "memory://shard-folder", recursive=True)
    return ShardFolder("memory://shard-folder")


def test_each_sample_is_the_image_that_was_converted(folder, sample_images):
    originals = {path.read_bytes(): path for path in (sample_images / "train").rglob("*.png")}
    samples = list(folder)
    assert len(folder) == len(samples) == len(originals) == 200
    for sample in samples:
        path = originals.pop(sample.image)
        assert folder.manifest.classes[sample.label] == path.parent.name
        assert (sample.format, sample.width, sample.height) == ("png", 28, 28)
        assert path.stem in sample.key
    assert not originals


def test_one_is_found_by_its_number(folder, stored):
    samples = list(folder)
    assert [sample.key for sample in folder[38:42]] == [sample.key for sample in samples[38:42]]
    for place in (folder, stored):
        assert [place[number] for number in (0, 39, 40, 199, -1, -200)] == [
            samples[number] for number in (0, 39, 40, 199, -1, -200)
        ]
    for number in (200, -201):
        with pytest.raises(IndexError):
            folder[number]


def test_in_a_store_it_is_the_same(folder, stored):
    assert stored.manifest.fingerprint == folder.manifest.fingerprint
    assert list(stored) == list(folder)
    assert [index.key(0) for index in stored.indexes()] == [index.key(0) for index in folder.indexes()]


def test_a_sample_of_other_bytes_is_no_sample(folder, shard_folder, tmp_path):
    copy = shutil.copytree(shard_folder, tmp_path / "copy")
    tar = sorted(copy.glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    place = content.index(folder[40].image)
    content[place + 20] ^= 1
    tar.write_bytes(content)
    damaged = ShardFolder(copy)
    assert damaged[41] == folder[41]
    for read in (lambda: damaged[40], lambda: list(damaged)):
        with pytest.raises(InputError, match=r"is damaged; run `shards verify"):
            read()


def test_what_a_store_has_lost_is_a_line_that_names_it(shard_folder):
    memory = fsspec.filesystem("memory")
    memory.put(str(shard_folder), "memory://damaged-folder", recursive=True)
    damaged = ShardFolder("memory://damaged-folder")
    first, second = (f"/damaged-folder/{shard.name}" for shard in damaged.manifest.shards[:2])
    memory.pipe(first, memory.cat(first)[:1000])
    memory.rm(second)
    for number in (39, 40):
        with pytest.raises(InputError, match=rf"memory://damaged-folder/train-00000{number // 40}.tar.*; restore it"):
            damaged[number]
    memory.put(str(shard_folder / damaged.manifest.shards[0].name), first)
    with pytest.raises(InputError, match=r"memory://damaged-folder/train-000001.tar: missing; restore it"):
        list(damaged)


def test_a_command_serves_it_too(folder, shard_folder, monkeypatch):
    monkeypatch.setenv(ALLOW_PIPE, "1")
    served = ShardFolder(f"pipe:cat {shard_folder}/{{name}}")
    assert served[41] == folder[41] and list(served)[41:43] == folder[41:43]


def test_what_is_no_shard_folder_is_a_line(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        ShardFolder(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        ShardFolder(tmp_path)
