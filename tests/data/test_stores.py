"""Shards in stores: real S3 and HTTP servers on this machine, with faults; always compared with the local stream."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from largescale.data import cache
from largescale.data.cache import NEVER, ShardLost
from largescale.data.fetcher import working_set
from largescale.data.loaded import Batch
from largescale.data.loader import Position
from largescale.data.reader import ShardReader
from largescale.data.stream import Stream
from shards.ground.errors import InputError
from shards.stores import store as store_module
from shards.stores.store import Store
from tests.helpers.commands import ROOT
from tests.helpers.servers import GcsServer, S3Server, WebServer, gcs_server, s3_server, web_server
from tests.helpers.streams import make_stream

pytestmark = pytest.mark.slow

STEPS = range(26)
"""Two epochs and a bit."""


@pytest.fixture(scope="module")
def s3(shard_folder: Path) -> Iterator[S3Server]:
    with s3_server() as server:
        server.upload(shard_folder, "photos")
        yield server


@pytest.fixture(scope="module")
def gcs(shard_folder: Path) -> Iterator[GcsServer]:
    with gcs_server() as server:
        server.upload(shard_folder, "photos")
        yield server


@pytest.fixture
def web(shard_folder: Path, tmp_path: Path) -> Iterator[WebServer]:
    """Serves a copy of the shards."""
    with web_server(Path(shutil.copytree(shard_folder, tmp_path / "served"))) as server:
        yield server


@pytest.fixture(scope="module")
def expected(shard_folder: Path) -> list[Batch]:
    """What the stream gives from a local folder."""
    return list(make_stream(shard_folder)(STEPS))


def remote(url: str, folder: Path, *overrides: str, **ranks: int) -> Stream:
    return make_stream(
        url, f"data.cache={folder / 'cache'}", "data.store_patience_s=40", "data.store_stall_s=10", *overrides, **ranks
    )


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.views, other.views, strict=True))
        assert not batch.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_gives_the_batches_of_the_folder(s3, tmp_path, expected, workers):
    assert_equal(list(remote("s3://photos", tmp_path, f"data.workers={workers}")(STEPS)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_so_does_one_of_google(gcs, tmp_path, expected, workers):
    assert_equal(list(remote("gs://photos", tmp_path, f"data.workers={workers}")(STEPS)), expected)


def test_every_byte_is_sent_once_however_many_ranks_read(web, tmp_path, expected):
    streams = [remote(web.url, tmp_path, "data.workers=1", rank=rank, ranks=4) for rank in range(4)]
    iterators = [stream(STEPS) for stream in streams]
    try:
        for step, other in enumerate(expected):
            batches = [next(iterator) for iterator in iterators]
            assert [key for batch in batches for key in batch.keys] == other.keys, step
    finally:
        for iterator in iterators:
            iterator.close()
    tars = {name: sent for name, sent in web.sent.items() if name.endswith(".tar")}
    assert tars == {path.name: path.stat().st_size for path in web.folder.glob("*.tar")}


def test_connections_that_break_are_taken_up_where_they_broke(web, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(store_module, "REQUEST_BYTES", 8192)
    web.resets = 3
    assert_equal(list(remote(web.url, tmp_path, "data.workers=1")(STEPS)), expected)
    sizes = {path.name: path.stat().st_size for path in web.folder.glob("*.tar")}
    # Whole answers alone count as sent; a reset may destroy one that its client had not read yet.
    assert all(size <= web.sent[name] <= 1.3 * size for name, size in sizes.items())


def test_a_request_that_hangs_is_made_again(web, tmp_path, expected):
    stream = remote(web.url, tmp_path, "data.store_stall_s=1")
    web.hangs = 2
    assert_equal(list(stream(STEPS)), expected)


def test_a_server_that_goes_away_for_a_while_is_waited_for(shard_folder, tmp_path, expected):
    with s3_server() as server:
        server.upload(shard_folder, "photos")
        size = sum(path.stat().st_size for path in shard_folder.glob("*.tar"))
        stream = remote(
            "s3://photos",
            tmp_path,
            "data.workers=1",
            "data.prefetch=1",
            "data.shuffle_window=4",
            "data.streams=1",
            f"data.cache_gb={0.65 * size / 1e9}",
        )
        local = list(make_stream(shard_folder, "data.shuffle_window=4", "data.streams=1")(STEPS))
        batches = []
        for batch in stream(STEPS):
            batches.append(batch)
            if batch.step == 3:
                server.kill()
                server.content = (shard_folder, "photos")
                threading.Timer(2, server.start).start()
    assert_equal(batches, local)


def test_a_store_that_stays_away_is_named(web, tmp_path):
    stream = remote(web.url, tmp_path, "data.store_patience_s=0.5")
    web.close()
    with pytest.raises(InputError, match=r"http://127.*\.tar: no answer for 0 s .* is the store up\?"):
        list(stream(STEPS))


def test_garbage_in_the_store_is_fetched_again_then_replaced_and_listed(web, tmp_path):
    tar = web.folder / "train-000002.tar"
    stream = remote(web.url, tmp_path)
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    batches = list(stream(range(12)))
    rows = [row for batch in batches for row in batch.skipped]
    assert {row["shard"] for row in rows} == {tar.name} and len(rows) > 30
    assert "fetched 3 times, its bytes do not match the manifest" in rows[0]["reason"]
    # Once by the fetcher and once by the reader, three times each, and not again.
    assert web.sent[tar.name] <= 6 * tar.stat().st_size
    assert not list((tmp_path / "cache").glob("*/train-000002*"))
    assert not list((tmp_path / "cache").glob("*/.*.part"))


def test_a_foreign_index_counts_as_damage(web, tmp_path):
    stream = remote(web.url, tmp_path)
    shutil.copy(web.folder / "train-000001.index.safetensors", web.folder / "train-000002.index.safetensors")
    with pytest.raises(ShardLost, match="is not the index named in the manifest"):
        stream.corpora[0].cache.get(2)


def test_a_shard_that_is_gone_is_replaced_and_listed(web, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MISSING_PAUSE_S", 0.1)
    stream = remote(web.url, tmp_path)
    (web.folder / "train-000002.tar").unlink()
    rows = [row for batch in stream(range(12)) for row in batch.skipped]
    assert len(rows) > 30 and all(row["reason"].endswith("train-000002.tar: no such file") for row in rows)


def test_a_cache_that_is_too_small_is_refused_with_the_numbers(web, tmp_path):
    says = r"the shard cache may take 1e-05 GB, but this node reads shards of [\d.e-]+ GB at the same time"
    with pytest.raises(InputError, match=rf"data\.cache_gb: {says}; raise data\.cache_gb"):
        remote(web.url, tmp_path, "data.cache_gb=0.00001")
    assert not list((tmp_path / "cache").glob("*/*.tar"))


def test_a_cache_that_is_too_small_for_a_later_epoch_is_named_at_the_start(web, tmp_path, caplog):
    settings = ["run.seed=1", "train.epochs=40", "data.streams=1", "data.shuffle_window=16", "data.prefetch=1"]
    stream = remote(web.url, tmp_path, *settings)
    by_epoch = [
        working_set(stream.order, stream.corpora, stream._own_streams, stream.data.prefetch + 2, step)
        for step in range(0, 40 * stream.order.steps_per_epoch, stream.order.steps_per_epoch)
    ]
    assert by_epoch[0] < max(by_epoch), "shards of these sizes are meant to tell"
    remote(web.url, tmp_path, *settings, f"data.cache_gb={(max(by_epoch) + 1) / 1e9}")
    assert not caplog.text
    remote(web.url, tmp_path, *settings, f"data.cache_gb={(max(by_epoch) - 1) / 1e9}")
    assert "at the same time; raise data.cache_gb" in caplog.text and "a later epoch may end the run" in caplog.text
    with pytest.raises(InputError, match=r"this node reads shards of .* at the same time"):
        remote(web.url, tmp_path, *settings, f"data.cache_gb={(by_epoch[0] - 1) / 1e9}")


def settled(folder: Path) -> list[tuple[Path, int]]:
    """Tars of a cache and their bytes, as two looks in a row agree on: one alone may see what goes and what comes."""
    before = None
    while True:
        with suppress(FileNotFoundError):
            now = [(path, path.stat().st_size) for path in sorted(folder.glob("*/*.tar"))]
            if now == before:
                return now
            before = now


def test_the_cache_keeps_to_its_size_and_what_it_evicts_was_not_needed(web, tmp_path, shard_folder):
    overrides = ["data.streams=1", "data.shuffle_window=16", "data.prefetch=1", "data.workers=1"]
    total = sum(path.stat().st_size for path in web.folder.glob("*.tar"))
    stream = remote(web.url, tmp_path, f"data.cache_gb={0.85 * total / 1e9}", *overrides)
    largest, batches = 0, []
    for batch in stream(range(36)):
        batches.append(batch)
        largest = max(largest, sum(size for _, size in settled(tmp_path / "cache")))
    assert_equal(batches, list(make_stream(shard_folder, *overrides)(range(36))))
    assert 0.3 * total < largest <= 0.85 * total
    # Three epochs of 12 steps from a cache of four of five shards: at least two are kept from one epoch to the next.
    assert total < sum(sent for name, sent in web.sent.items() if name.endswith(".tar")) <= 2.5 * total


def removed_tars() -> list[str]:
    """Tars without a name that this process holds open."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(descriptor))
    return [Path(link).name for link in links if link.endswith(".tar (deleted)")]


@pytest.mark.parametrize("needed, open_still", [(NEVER, []), (0, ["train-000000.tar (deleted)"])])
def test_an_evicted_shard_is_closed_unless_it_is_needed_at_once(web, tmp_path, needed, open_still):
    """Its disk has the room back; keys and labels of its samples that are on their way need no other fetch."""
    corpora = remote(web.url, tmp_path).corpora
    reader = ShardReader(corpora, lambda tar: needed if tar == corpora[0].manifest.tar_path(0) else 0)
    first = reader.read(0), reader.key(0), reader.label(0)
    for path in (tmp_path / "cache").glob("*/train-000000*"):
        path.unlink()
    reader.read(int(reader.first_ids[1]))
    assert removed_tars() == open_still
    sent = dict(web.sent)
    assert (reader.key(0), reader.label(0)) == first[1:] and web.sent == sent
    assert reader.read(0) == first[0]
    assert (web.sent["train-000000.tar"] == sent["train-000000.tar"]) == bool(open_still)


@pytest.mark.parametrize("folder", ["/proc/cache", "/dev/null/cache"])
def test_a_cache_that_cannot_be_written_is_refused(web, folder):
    with pytest.raises(InputError, match=f"{folder}/train-.*: the shard cache cannot be written .*set data.cache"):
        make_stream(web.url, f"data.cache={folder}")


def test_a_full_disk_is_one_line(web, tmp_path):
    script = (
        "mount -t tmpfs -o size=32k none {cache} && exec {python} -m largescale pretrain {tiny} "
        "data.shards={url} data.cache={cache} data.cache_gb=1 run.dir={run} train.steps=4"
    )
    (tmp_path / "cache").mkdir()
    command = script.format(
        cache=tmp_path / "cache",
        python=sys.executable,
        tiny=ROOT / "tests" / "tiny.yaml",
        url=web.url,
        run=tmp_path / "run",
    )
    result = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "the disk of the shard cache is full; make room" in result.stderr and "Traceback" not in result.stderr


def test_commands_run_only_where_that_is_allowed(shard_folder, tmp_path, expected, monkeypatch):
    url = f"pipe:cat {shard_folder}/{{name}}"
    with pytest.raises(InputError, match="set LARGESCALE_ALLOW_PIPE=1 in the environment"):
        remote(url, tmp_path)
    monkeypatch.setenv(store_module.ALLOW_PIPE, "1")
    with pytest.raises(InputError, match=r"expected \{name\} in the command"):
        remote("pipe:cat file", tmp_path)
    assert_equal(list(remote(url, tmp_path)(STEPS)), expected)


@pytest.mark.parametrize(
    "url, says",
    [
        ("nowhere://bucket", "nowhere://bucket: Protocol not known"),
        ("s3://photos/none", "no manifest.json there"),
        ("s3://no-such-bucket", "no manifest.json there"),
    ],
)
def test_a_store_that_cannot_be_used(s3, tmp_path, url, says):
    with pytest.raises(InputError, match=says):
        remote(url, tmp_path)


def test_credentials_that_are_missing_are_not_waited_for(s3, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    pauses: list[float] = []
    monkeypatch.setattr(store_module.time, "sleep", pauses.append)
    with pytest.raises(InputError, match=r"permission denied .*check the credentials"):
        remote("s3://photos", tmp_path)
    assert not pauses


def test_a_loader_that_stands_still_says_for_what(web, tmp_path, caplog):
    stream = remote(web.url, tmp_path, "data.workers=1", "data.store_stall_s=0.5", "data.fetches=1")
    web.hangs = 3
    with caplog.at_level(logging.WARNING):
        next(iter(stream(STEPS)))
    lines = [record.message for record in caplog.records if "loader process 0" in record.message]
    assert lines and any(f"{web.url}/train-00000" in line for line in lines)


def test_a_shard_that_is_denied_at_first_is_asked_for_again(web, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(cache, "_MISSING_PAUSE_S", 0.3)
    stream = remote(web.url, tmp_path, "data.workers=0")
    tar = web.folder / "train-000002.tar"
    tar.rename(hidden := tar.with_suffix(".hidden"))
    threading.Timer(0.5, lambda: hidden.rename(tar)).start()
    assert stream.corpora[0].cache.get(2)
    assert_equal(list(stream(STEPS)), expected)


def test_whole_answers_to_range_requests_are_understood(shard_folder, tmp_path, monkeypatch):
    """Some servers ignore ranges; Python's own is one."""
    monkeypatch.setattr(store_module, "REQUEST_BYTES", 4096)
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=shard_folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        port = server.stdout.readline().split(" port ")[1].split()[0]
        tar = shard_folder / "train-000001.tar"
        Store(f"http://127.0.0.1:{port}").fetch(tar.name, tmp_path / "copy", tar.stat().st_size)
        server.kill()
    assert (tmp_path / "copy").read_bytes() == tar.read_bytes()


def test_the_position_is_shared():
    position = Position()
    position.set(2**40)
    assert position.get() == 2**40
