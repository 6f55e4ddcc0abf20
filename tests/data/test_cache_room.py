"""The cache keeps to its limit at every moment, whoever fetches and evicts at the same time.

Covers: largescale/data/cache.py, largescale/data/cache_files.py
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from largescale.data import cache
from largescale.data.cache import FOREIGN, NEVER, ShardCache, open_cache
from largescale.data.cache_files import held, lock_of, locked, part_of, room_of
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from shards.stores.store import Store
from tests.helpers.servers import WebServer, web_server


@pytest.fixture
def web(shard_folder: Path, tmp_path: Path) -> Iterator[WebServer]:
    """Serves a copy of the five shards."""
    with web_server(Path(shutil.copytree(shard_folder, tmp_path / "served"))) as server:
        yield server


def make_cache(web: WebServer, folder: Path, shards: float) -> ShardCache:
    """A cache with room for so many shards."""
    manifest = read_manifest(web.folder)
    largest = max(entry.num_bytes for entry in manifest.shards)
    return open_cache(Store(web.url, patience_s=20, stall_s=10), manifest, folder / "cache", shards * largest / 1e9)


def by_number(shard_cache: ShardCache, use: Callable[[int], int]) -> Callable[[Path], int]:
    """When tars are read next, by their numbers in the manifest."""
    number = {shard_cache.manifest.tar_path(shard): shard for shard in range(5)}
    return lambda tar: use(number[tar]) if tar in number else FOREIGN


def test_the_limit_holds_at_every_change(web, tmp_path, monkeypatch):
    capacity, changing, sums = make_cache(web, tmp_path, 2.5), threading.Lock(), []
    replace, unlink = os.replace, Path.unlink

    def replace_and_look(source: Path, target: Path) -> None:
        with changing:
            replace(source, target)
            sums.append(sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar")))

    def unlink_alone(path: Path, missing_ok: bool = False) -> None:
        with changing:
            unlink(path, missing_ok)

    monkeypatch.setattr(os, "replace", replace_and_look)
    monkeypatch.setattr(Path, "unlink", unlink_alone)

    def read(seed: int) -> None:
        own, rng = pickle.loads(pickle.dumps(capacity)), random.Random(seed)
        for _ in range(25):
            own.get(rng.randrange(5))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sums) > 20 and max(sums) > 0.7 * capacity.capacity, "two shards at a time are meant to be there"
    assert max(sums) <= capacity.capacity
    assert not list((tmp_path / "cache").glob("*/.*.room")) and not list((tmp_path / "cache").glob("*/.*.part"))


@pytest.mark.parametrize("arrives_after", [1, 2])
def test_a_shard_that_arrives_while_the_cache_is_looked_at_counts_once(tmp_path, monkeypatch, arrives_after):
    tar = tmp_path / "photos" / "photos-000000.tar"
    tar.parent.mkdir()
    part_of(tar).write_bytes(bytes(700))
    with room_of(tar).open("wb") as room:
        room.truncate(1000)
    glob, looked = Path.glob, []

    def glob_and_arrive(folder: Path, pattern: str) -> list[Path]:
        found = list(glob(folder, pattern))
        looked.append(pattern)
        if len(looked) == arrives_after:
            part_of(tar).write_bytes(bytes(1000))
            os.replace(part_of(tar), tar)
            room_of(tar).unlink()
        return found

    monkeypatch.setattr(Path, "glob", glob_and_arrive)
    sizes = {shard.tar: shard.num_bytes for shard in held(tmp_path)}
    assert tar.exists() and sizes == {tar: 1000} and len(held(tmp_path)) == 1


def test_a_shard_on_its_way_is_waited_for_not_overrun(web, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_ROOM_PAUSE_S", 0.02)
    shard_cache, said = make_cache(web, tmp_path, 1.5), threading.Event()
    coming = shard_cache.manifest.tar_path(3)
    coming.parent.mkdir(parents=True, exist_ok=True)
    with room_of(coming).open("wb") as room:
        room.truncate(shard_cache.manifest.shards[3].num_bytes)
    reader = threading.Thread(
        target=shard_cache.get,
        args=(
            0,
            by_number(shard_cache, lambda shard: 0 if shard == 0 else NEVER),
            lambda text: said.set() if text.startswith("waiting for room") else None,
        ),
    )
    with locked(lock_of(coming)):
        reader.start()
        assert said.wait(20)
        time.sleep(0.1)
        assert not shard_cache.has(0)
        room_of(coming).unlink()
        reader.join()
        assert shard_cache.has(0)


@pytest.mark.parametrize("folder", ["", "other-run"])
def test_room_that_a_killed_fetch_took_is_given_back(web, tmp_path, folder):
    """Also to a shard that is not needed yet, and if the one that was on its way is needed sooner."""
    shard_cache = make_cache(web, tmp_path, 1.5)
    tar = shard_cache.manifest.tar_path(3)
    coming = tar.parents[1] / (folder or tar.parent.name) / tar.name
    with locked(lock_of(coming)):
        part_of(coming).write_bytes(bytes(100))
        with room_of(coming).open("wb") as room:
            room.truncate(shard_cache.manifest.shards[3].num_bytes)
        assert not shard_cache.get(0, by_number(shard_cache, lambda shard: 3 - shard), patient=True)
        assert room_of(coming).exists() and not shard_cache.has(0)
    assert shard_cache.get(0, by_number(shard_cache, lambda shard: 3 - shard), patient=True)
    assert not room_of(coming).exists() and part_of(coming).exists()


def test_the_part_of_a_killed_fetch_goes_for_what_is_needed_sooner(web, tmp_path):
    shard_cache = make_cache(web, tmp_path, 1.5)
    coming = shard_cache.manifest.tar_path(3)
    with locked(lock_of(coming)):
        part_of(coming).write_bytes(bytes(shard_cache.manifest.shards[3].num_bytes - 1))
        assert not shard_cache.get(0, by_number(shard_cache, lambda shard: shard), patient=True)
    assert not shard_cache.get(0, by_number(shard_cache, lambda shard: 3 - shard), patient=True)
    assert part_of(coming).exists()
    assert shard_cache.get(0, by_number(shard_cache, lambda shard: shard), patient=True)
    assert not part_of(coming).exists()


def test_what_a_killed_fetch_has_brought_is_not_fetched_again(web, tmp_path):
    shard_cache = make_cache(web, tmp_path, 1.5)
    tar = shard_cache.manifest.tar_path(3)
    with locked(lock_of(tar)):
        part_of(tar).write_bytes((web.folder / tar.name).read_bytes()[:1000])
    assert shard_cache.get(3, patient=True)
    assert web.sent[tar.name] == shard_cache.manifest.shards[3].num_bytes - 1000


def test_shards_that_others_are_reading_go_only_where_there_is_no_other_way(web, tmp_path):
    shard_cache = make_cache(web, tmp_path, 1.5)
    other = shard_cache.manifest.root.parent / "other-run" / "other-000000.tar"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(shard_cache.manifest.shards[0].num_bytes))
    assert not shard_cache.get(0, patient=True) and other.exists()
    assert shard_cache.get(0) and not other.exists()


def test_shards_of_another_corpus_of_the_run_go_by_when_they_are_needed(web, tmp_path):
    shard_cache = make_cache(web, tmp_path, 1.5)
    other = shard_cache.manifest.root.parent / "other-corpus" / "other-000000.tar"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(shard_cache.manifest.shards[0].num_bytes))
    os.utime(other, (0, 0))
    use = {other: 1}
    assert not shard_cache.get(0, lambda tar: use.get(tar, 2), patient=True) and other.exists()
    use[other] = 3
    assert shard_cache.get(0, lambda tar: use.get(tar, 2), patient=True) and not other.exists()


def test_a_shard_larger_than_the_cache_is_an_error(web, tmp_path):
    line = r"no room for train-000001\.tar \(.* GB\) in a cache of .* GB; raise data\.cache_gb"
    with pytest.raises(InputError, match=line):
        make_cache(web, tmp_path, 0.5).get(1)
