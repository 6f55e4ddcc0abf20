"""Damage and outages of stores, one fault a test: what is fetched, how often, how long it is waited for.

Covers: largescale/data/cache_counters.py, shards/stores/pipe.py
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest

from largescale.config import Config, MethodConfig
from largescale.data import cache, fetcher
from largescale.data.cache import ShardCache, ShardLost, open_cache
from largescale.data.corpora import Corpus
from largescale.data.fetcher import Fetcher
from largescale.data.frames import require_clips
from largescale.data.reader import ShardReader
from largescale.evaluate.action import check_clips
from shards.format.manifest import read_manifest
from shards.format.shard_index import index_path, read_index
from shards.ground.errors import InputError
from shards.stores import store as store_module
from shards.stores.store import Missing, Refused, Store, Torn
from tests.helpers.commands import ROOT
from tests.helpers.servers import WebServer, web_server
from tests.helpers.streams import make_stream


@pytest.fixture
def web(shard_folder: Path, tmp_path: Path) -> Iterator[WebServer]:
    """Serves a copy of the shards."""
    with web_server(Path(shutil.copytree(shard_folder, tmp_path / "served"))) as server:
        yield server


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store_module.ALLOW_PIPE, "1")


def make_cache(web: WebServer, folder: Path, patience_s: float = 20) -> ShardCache:
    return open_cache(Store(web.url, patience_s=patience_s, stall_s=10), read_manifest(web.folder), folder / "cache", 1)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")")[-1].split()[0] != "Z"


@pytest.mark.parametrize("request_bytes", [4096, 2**24])
def test_a_torn_shard_is_fetched_three_times_and_lost(web, tmp_path, monkeypatch, request_bytes):
    monkeypatch.setattr(store_module, "REQUEST_BYTES", request_bytes)
    monkeypatch.setattr(cache, "_MISSING_PAUSE_S", 0.01)
    shard_cache = make_cache(web, tmp_path)
    os.truncate(web.folder / "train-000002.tar", 9000)
    with pytest.raises(ShardLost, match=r"train-000002\.tar: ends at byte 9,000, .* fetched 3 times; restore it"):
        shard_cache.get(2)
    assert not list((tmp_path / "cache").glob("*/.*.part"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another(path: Path) -> None:
    shutil.copy(path.with_name(path.name.replace("000002", "000001")), path)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(int(read_index(index_path(path)).offset[5]) + 20)
        file.write(b"\xff" * 40)


@pytest.mark.parametrize(
    "damage, suffix",
    [
        (empty, "index.safetensors"),
        (Path.unlink, "index.safetensors"),
        (of_another, "index.safetensors"),
        (cut, "tar"),
        (empty, "tar"),
        (overwritten, "tar"),
    ],
)
def test_a_cached_shard_that_was_damaged_is_fetched_again(web, tmp_path, damage, suffix, caplog):
    caches = [make_cache(web, tmp_path) for _ in range(3)]
    said: list[str] = []
    readers = [ShardReader([Corpus(one.manifest, cache=one)], status=said.append) for one in caches]
    for number in range(5):
        caches[0].get(number)
    damage(caches[0].manifest.root / f"train-000002.{suffix}")
    web.sent.clear()
    threads = [threading.Thread(target=reader.read, args=(85,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = ShardReader([Corpus(read_manifest(web.folder))])
    assert {reader.read(85) for reader in readers} == {whole.read(85)} and not any(reader._lost for reader in readers)
    assert web.sent["train-000002.tar"] == whole.corpora[0].manifest.shards[2].num_bytes and len(web.sent) == 2
    assert caplog.text.count("train-000002.tar: is damaged; it is fetched again") == 1
    compared = f"comparing {caches[0].manifest.root / 'train-000002.tar'} with the manifest"
    assert (compared in said) == (damage is overwritten)


def test_an_index_that_was_lost_is_read_from_the_store_and_no_tar_is_fetched(web, tmp_path):
    shard_cache = make_cache(web, tmp_path)
    corpus = Corpus(shard_cache.manifest, cache=shard_cache)
    whole = read_index(read_manifest(web.folder).index_path(2))
    assert corpus.index(2).key(7) == whole.key(7)
    sent = web.sent.total()
    assert (corpus.index(2).label == whole.label).all() and web.sent.total() == sent, "it is kept"
    assert not any(name.endswith(".tar") for name in web.sent)
    shard_cache.get(2)
    sent = web.sent.total()
    assert corpus.index(2).key(7) == whole.key(7) and web.sent.total() == sent
    empty(corpus.manifest.index_path(2))
    assert corpus.index(2).key(7) == whole.key(7)
    corpus.manifest.index_path(2).unlink()
    of_another(web.folder / "train-000002.index.safetensors")
    with pytest.raises(InputError, match=rf"^{web.url}: .* is not the index named in the manifest; restore it"):
        corpus.index(2)


@pytest.mark.parametrize(
    "damage, names_index", [(cut, True), (cut, False), (of_another, True), (Path.unlink, True), (Path.unlink, False)]
)
def test_an_index_that_the_store_has_wrong_at_first_is_asked_for_again(web, tmp_path, monkeypatch, damage, names_index):
    path = web.folder / "train-000002.index.safetensors"
    whole, shard_cache = path.read_bytes(), make_cache(web, tmp_path)
    damage(path)
    entries = tuple(
        entry if names_index else replace(entry, index_checksum="") for entry in shard_cache.manifest.shards
    )
    shard_cache.manifest = replace(shard_cache.manifest, shards=entries)
    monkeypatch.setattr(cache, "pause", lambda seconds: None)
    with pytest.raises(InputError, match=rf"^{web.url}.* 3 times|^{web.url}/train-000002\S+: no such file"):
        shard_cache.read_index(2)
    read = Store.read

    def mended_after(store: Store, name: str) -> bytes:
        try:
            return read(store, name)
        finally:
            path.write_bytes(whole)

    monkeypatch.setattr(Store, "read", mended_after)
    assert shard_cache.read_index(2).key(7) == read_index(read_manifest(web.folder).index_path(2)).key(7)
    assert shard_cache.manifest.index_path(2).read_bytes() == whole


def test_what_is_damaged_in_the_store_too_is_lost_after_one_more_fetch(web, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MISSING_PAUSE_S", 0.01)
    shard_cache = make_cache(web, tmp_path)
    reader = ShardReader([Corpus(shard_cache.manifest, cache=shard_cache)])
    shard_cache.get(2)
    for folder in (shard_cache.manifest.root, web.folder):
        empty(folder / "train-000002.index.safetensors")
    with pytest.raises(ShardLost, match="is not the index named in the manifest; restore it, or convert again"):
        reader.read(85)


def test_a_cached_shard_that_the_store_has_wrong_is_mended_where_it_came_from(web, tmp_path, monkeypatch):
    shard_cache = make_cache(web, tmp_path)
    entries = tuple(replace(entry, num_samples=41, index_checksum="") for entry in shard_cache.manifest.shards)
    manifest = replace(shard_cache.manifest, shards=entries)
    corpus = Corpus(manifest, cache=replace(shard_cache, manifest=manifest))
    mend = f"or run `shards verify` on the folder that {web.url} was uploaded from"
    with pytest.raises(ShardLost, match=f"lists 40 samples, the manifest says 41; restore both, {mend}$"):
        ShardReader([corpus]).read(85)
    monkeypatch.setattr(type(MethodConfig()), "frame_tuples", lambda self: object())
    with pytest.raises(InputError, match=f"^{web.url}: holds images"):
        require_clips(Config(), [corpus])
    with pytest.raises(InputError, match=rf"^data\.shards={web.url}: images, not clips"):
        check_clips(Corpus(shard_cache.manifest, cache=shard_cache), "data.shards")


def test_what_cannot_be_opened_for_other_reasons_stays(web, tmp_path, monkeypatch):
    shard_cache = make_cache(web, tmp_path)
    shard_cache.get(2)
    monkeypatch.setattr(Path, "read_bytes", partial(fails, errno.EMFILE))
    assert not shard_cache.drop_damaged(2) and shard_cache.has(2)


def test_a_cached_shard_that_its_disk_cannot_read_is_fetched_again(web, tmp_path, monkeypatch):
    shard_cache = make_cache(web, tmp_path)
    shard_cache.get(2)
    monkeypatch.setattr(cache, "file_checksum", partial(fails, errno.EIO))
    assert shard_cache.drop_damaged(2, look_at_all=True) and not shard_cache.has(2)


def fails(number: int, *_: object) -> bytes:
    raise OSError(number, os.strerror(number))


def test_the_index_is_on_the_disk_before_its_tar_is_there(web, tmp_path, monkeypatch):
    shard_cache, synced, fsync = make_cache(web, tmp_path), [], os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, shard_cache.has(2)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    shard_cache.get(2)
    assert (shard_cache.manifest.index_path(2).stat().st_ino, False) in synced


def test_a_range_beyond_the_end_is_damage(web):
    def answer(request: SimpleHTTPRequestHandler) -> None:
        request.send_error(416)

    web.answer = answer
    name = "train-000001.tar"
    size = (web.folder / name).stat().st_size
    with pytest.raises(Torn, match="ends at byte"):
        Store(web.url, patience_s=20).read_range(name, size, size + 10)


def test_credentials_that_were_renewed_are_read_again_once(web, monkeypatch):
    store, connect, answer = Store(web.url, patience_s=20), Store._connect, web.answer
    connected = []

    def renewed(self: Store) -> None:
        connected.append(self)
        web.answer = answer
        connect(self)

    monkeypatch.setattr(Store, "_connect", renewed)
    web.answer = lambda request: request.send_error(403)
    assert store.read("manifest.json") == (web.folder / "manifest.json").read_bytes() and connected == [store]
    monkeypatch.setattr(Store, "_connect", lambda self: connected.append(self))
    web.answer = lambda request: request.send_error(403)
    with pytest.raises(InputError, match=r"permission denied .* check the credentials"):
        store.read("manifest.json")
    assert connected == [store] * 2


def test_a_store_that_refuses_the_connections_of_loader_processes_at_first_is_asked_again(web, tmp_path, monkeypatch):
    connects_at_once, connect, asked = {os.getpid()}, Store._connect, itertools.count()

    def refuses(self: Store) -> None:
        if os.getpid() not in connects_at_once and next(asked) < 2:
            raise ConnectionRefusedError("too many connections")
        connect(self)

    monkeypatch.setattr(Store, "_connect", refuses)
    store = Store(web.url, patience_s=20)
    stream = make_stream(web.url, f"data.cache={tmp_path / 'cache'}", "data.workers=1")
    assert len(list(stream(range(2)))) == 2
    connects_at_once.clear()
    store.begin_in_process()
    assert store.read("manifest.json") == (web.folder / "manifest.json").read_bytes() and next(asked) == 3
    asked, store.patience_s = itertools.count(-(10**6)), 0
    store.begin_in_process()
    with pytest.raises(Refused, match=r"no answer for 0 s \(ConnectionRefusedError: too many connections\)"):
        store.read("manifest.json")


def test_what_is_gone_for_good_is_missing(web):
    web.answer = lambda request: request.send_error(410)
    with pytest.raises(Missing):
        Store(web.url, patience_s=20).read("train-000001.tar")


def test_whole_answers_are_kept_whole(web, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "REQUEST_BYTES", 4096)
    tar, requests = web.folder / "train-000001.tar", []

    def answer(request: SimpleHTTPRequestHandler) -> None:
        requests.append(request.path)
        request.send_response(200)
        request.send_header("Content-Length", str(tar.stat().st_size))
        request.end_headers()
        request.wfile.write(tar.read_bytes())

    web.answer = answer
    for held in (0, 5000):
        (tmp_path / "copy").write_bytes(tar.read_bytes()[:held])
        Store(web.url).fetch(tar.name, tmp_path / "copy", tar.stat().st_size)
        assert (tmp_path / "copy").read_bytes() == tar.read_bytes()
    assert len(requests) == 2


def test_a_command_may_take_long_as_long_as_bytes_come(pipes, tmp_path, monkeypatch):
    # By this clock 100 s pass whenever somebody looks at it: far longer than both limits, and nothing fails.
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 100).__next__)
    store = Store("pipe:for i in $(seq 20); do printf {name}; done", patience_s=0.5, stall_s=60)
    store.fetch("ab", tmp_path / "copy", 40)
    assert (tmp_path / "copy").read_bytes() == 20 * b"ab"
    assert store.read("c") == 20 * b"c"


def test_a_command_that_stands_still_is_killed_with_what_it_started(pipes, tmp_path):
    store = Store(f"pipe:sleep 100 & echo $! > {tmp_path}/{{name}}; wait", patience_s=0.1, stall_s=1)
    with pytest.raises(InputError, match="not a byte for"):
        store.read("pid")
    wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())))


def test_a_command_ends_with_a_process_that_is_killed(pipes, tmp_path):
    url = f"pipe:sleep 100 & echo $! > {tmp_path}/{{name}}; wait"
    script = f"from shards.stores.store import Store; Store({url!r}).read('pid')"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as process:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
        process.kill()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(pid))


def test_those_who_wait_for_one_shard_wait_once(web, tmp_path, caplog, monkeypatch):
    passed = [0.0]  # in place of the pauses that it makes
    monkeypatch.setattr(store_module, "time", SimpleNamespace(monotonic=lambda: passed[0]))
    monkeypatch.setattr(store_module, "pause", lambda seconds: passed.append(passed.pop() + seconds))
    caches = [make_cache(web, tmp_path, patience_s=600) for _ in range(4)]
    web.close()
    errors, patient, ask = [], [], Store.fetch

    def count(store: Store, *arguments: object) -> None:
        patient.append(store.patience_s)
        ask(store, *arguments)

    monkeypatch.setattr(Store, "fetch", count)

    def get(shard_cache: ShardCache) -> None:
        try:
            shard_cache.get(2)
        except InputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=get, args=(shard_cache,)) for shard_cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(patient) == [0, 0, 0, 600]
    assert len(errors) == 4 and len(set(errors)) == 1 and "no answer for 600 s" in errors[0]
    lines = [record.message for record in caplog.records if "train-000002.tar: no answer for" in record.message]
    assert 10 < len(lines) <= 20 and all(line.endswith("asking again, for up to 600 s") for line in lines)


def test_a_damaged_shard_is_fetched_in_vain_by_one_process_and_later_once_more(web, tmp_path, monkeypatch):
    caches = [make_cache(web, tmp_path) for _ in range(4)]
    fetched, fetch = [], Store.fetch
    monkeypatch.setattr(Store, "fetch", lambda *arguments: (fetched.append(arguments[1]), fetch(*arguments))[1])
    tar = web.folder / "train-000002.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1] + b"x")

    def get(shard_cache: ShardCache) -> str:
        with pytest.raises(ShardLost) as lost:
            shard_cache.get(2)
        return str(lost.value)

    with ThreadPoolExecutor(4) as pool:
        [reason] = set(pool.map(get, caches))
    assert "fetched 3 times, its bytes do not match" in reason and fetched == [tar.name] * 3
    [mark] = (tmp_path / "cache").glob("*/.*.lost")
    os.utime(mark, (0, 0))
    assert {get(shard_cache) for shard_cache in caches} == {reason.replace("3 times", "again")}
    assert fetched == [tar.name] * 4
    tar.write_bytes(whole)
    os.utime(mark, (0, 0))
    assert caches[3].get(2) and not mark.exists()


def test_a_shard_that_one_store_has_lost_is_asked_of_another_one_of_the_same_shards(web, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MISSING_PAUSE_S", 0.01)
    shutil.copytree(web.folder, tmp_path / "copy")
    (web.folder / "train-000002.tar").unlink()
    with web_server(tmp_path / "copy") as whole:
        lacking, having = make_cache(web, tmp_path), make_cache(whole, tmp_path)
        with pytest.raises(ShardLost):
            lacking.get(2)
        assert having.manifest.root == lacking.manifest.root and having.get(2)


def test_a_shard_that_was_lost_is_asked_for_at_the_next_start(web, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MISSING_PAUSE_S", 0.01)
    tar = web.folder / "train-000002.tar"
    tar.rename(hidden := tar.with_suffix(".hidden"))
    with pytest.raises(ShardLost):
        make_cache(web, tmp_path).get(2)
    hidden.rename(tar)
    assert make_cache(web, tmp_path).get(2)


def test_a_store_that_is_back_is_used(web, tmp_path):
    shard_cache = make_cache(web, tmp_path, patience_s=0.2)
    tar = web.folder / "train-000002.tar"
    answer, web.answer = web.answer, lambda request: request.send_error(503)
    with pytest.raises(InputError, match="is the store up"):
        shard_cache.get(2)
    web.answer = answer
    assert shard_cache.get(2) and shard_cache.manifest.tar_path(2).read_bytes() == tar.read_bytes()
    assert not list((tmp_path / "cache").glob("*/.*.away"))


@pytest.mark.parametrize("workers, by_key", [(0, False), (1, False), (2, True)])
def test_bytes_that_were_fetched_are_counted_once(web, shard_folder, tmp_path, workers, by_key):
    reader, keys = ShardReader([Corpus(read_manifest(shard_folder))]), tmp_path / "keys"
    keys.write_text("\n".join(map(reader.key, range(len(reader)))))
    subset = [f"data.subset={keys}"] if by_key else []
    stream = make_stream(web.url, f"data.cache={tmp_path / 'cache'}", f"data.workers={workers}", *subset)
    assert not any(name.endswith(".tar") for name in web.sent), "keys are looked up in indexes alone"
    batches = list(stream(range(14)))
    sent = sum(count for name, count in web.sent.items() if name.endswith(".tar"))
    assert sent == sum(batch.costs["fetched_bytes"] for batch in batches)
    assert sum(batch.costs["hits"] + batch.costs["misses"] for batch in batches) > 0
    assert stream._needs.upcoming(stream._own_streams).first_step.max() < 14, "nothing is read after the run"


def test_a_fetcher_that_is_killed_is_started_again(web, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fetcher, "_RESTART_S", 0)
    stream = make_stream(web.url, f"data.cache={tmp_path / 'cache'}")
    hangs, web.hangs = web.hangs, 10**6
    fetching = Fetcher(stream.corpora, stream._needs, stream._own_streams, 2)
    try:
        fetching.attend()
        assert not caplog.records
        os.kill(fetching._process.pid, signal.SIGKILL)
        fetching._process.join()
        web.hangs = hangs
        with caplog.at_level(logging.WARNING):
            fetching.attend()
        assert "was killed by SIGKILL; starting it again" in caplog.text
        wait_until(lambda: len(list((tmp_path / "cache").glob("*/*.tar"))) == 5)
        total = sum(path.stat().st_size for path in web.folder.glob("*.tar"))
        fetched = 0

        def all_counted() -> bool:
            nonlocal fetched
            fetched += fetching.attend()["fetched_bytes"]
            return fetched == total

        wait_until(all_counted)
    finally:
        fetching.close()


@pytest.mark.parametrize(
    "url, says",
    [
        ("ftp://127.0.0.1:1/x", r"ftp://127.*:1/x: cannot be opened \(ConnectionRefusedError: .*\); check the address"),
        ("s4://x/y", "s4://x/y: Protocol not known: s4; expected one such as s3://bucket/folder"),
    ],
)
def test_a_url_that_cannot_be_opened_is_one_line_with_a_remedy(url, says):
    with pytest.raises(InputError, match=says):
        Store(url)
