"""Loader processes: what they choose, how they end, and that nothing makes them start anew.

Covers: largescale/data/batches.py
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from largescale.data.batches import BatchMaker, Buffers
from largescale.data.cache import ShardLost
from largescale.data.corpora import Corpus
from largescale.data.loader import LoaderDied
from largescale.data.reader import OPEN_ATTEMPTS, SampleError, ShardReader
from largescale.data.stream import Stream
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from tests.helpers.streams import make_stream


def loaders() -> set[int]:
    """Process ids of this process's children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(child) for child in children}


def running(stream: Stream, before: set[int]) -> set[int]:
    return loaders() - before


def cpu_seconds(process: int) -> float:
    """What a process has computed so far: unlike a clock it does not go on while others do."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_epochs_turn_without_a_new_process_and_the_end_leaves_none(shard_folder):
    before = loaders()
    stream = make_stream(shard_folder, "data.workers=2")
    seen = [frozenset(running(stream, before)) for _ in stream(range(30))]
    assert stream.order.steps_per_epoch == 12 and len(set(seen)) == 1 and len(seen[0]) == 2
    assert loaders() == before


def test_an_iteration_that_is_left_early_leaves_no_process(shard_folder):
    before = loaders()
    batches = make_stream(shard_folder, "data.workers=2")(range(30))
    next(batches)
    batches.close()
    assert loaders() == before


def test_a_loader_process_that_dies_is_named(shard_folder):
    before = loaders()
    stream = make_stream(shard_folder, "data.workers=2", "data.prefetch=1")
    batches = stream(range(10_000))
    next(batches)
    victim = max(running(stream, before))
    os.kill(victim, signal.SIGKILL)
    says = rf"loader process \d \(pid {victim}\) was killed by signal 9, .*out of memory"
    with pytest.raises(LoaderDied, match=says):
        list(batches)
    assert loaders() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_while_it_is_read_is_lost_and_named(shard_folder, tmp_path, workers):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "cut"))
    stream = make_stream(folder, f"data.workers={workers}", "data.prefetch=1")
    with closing(stream(range(10_000))) as batches:
        for _ in range(12):
            next(batches)
        tar = folder / "train-000003.tar"
        size = tar.stat().st_size
        os.truncate(tar, 4096)
        skipped = [row for batch in islice(batches, 24) for row in batch.skipped]
    assert {row["shard"] for row in skipped} == {tar.name}
    says = f"{tar}: is 4,096 bytes, the manifest says {size:,}: it was truncated or replaced; restore it"
    reasons = {row["reason"] for row in skipped}
    assert all(reason.startswith(says) for reason in reasons), reasons


def test_a_disk_that_fails_costs_what_it_cannot_read(shard_folder, monkeypatch):
    reader, failures, read = ShardReader([Corpus(read_manifest(shard_folder))]), [], os.pread

    def failing(*place: int) -> bytes:
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return read(*place)

    monkeypatch.setattr(os, "pread", failing)
    whole = reader.read(50)
    failures += [errno.EIO] * (OPEN_ATTEMPTS - 1)
    assert reader.read(50) == whole
    failures += [errno.EIO] * OPEN_ATTEMPTS
    with pytest.raises(SampleError, match=r"cannot be read \(.*/train-000001\.tar: Input/output error\)"):
        reader.read(50)


def test_a_bug_in_a_loader_process_is_shown_whole(shard_folder, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("largescale.data.batches.crop", broken)
    with pytest.raises(RuntimeError, match=r"(?s)loader process 0:.*Traceback.*in _fill.*ZeroDivisionError: a bug"):
        next(iter(make_stream(shard_folder, "data.workers=1")(range(3))))


def test_what_the_user_can_mend_is_a_line_wherever_a_loader_process_meets_it(shard_folder, monkeypatch):
    def away(*_: object) -> None:
        raise InputError("the store is away")

    monkeypatch.setattr(BatchMaker, "make", away)
    with pytest.raises(InputError, match="the store is away"):
        next(iter(make_stream(shard_folder, "data.workers=1")(range(3))))


def test_a_stop_signal_does_not_end_loader_processes(shard_folder):
    before = loaders()
    stream = make_stream(shard_folder, "data.workers=1", "data.prefetch=1")
    batches = stream(range(8))
    next(batches)
    for child in running(stream, before):
        os.kill(child, signal.SIGTERM)
    assert len(list(batches)) == 7


@pytest.mark.parametrize("step", [0, 11, 10**6, 10**12 + 5])
def test_any_position_is_reached_at_once(shard_folder, step):
    before, stream = loaders(), make_stream(shard_folder, "data.workers=2")
    started = time.process_time()
    batches = stream(range(step, step + 3))
    first = next(batches)
    assert first.step == step
    assert time.process_time() - started + sum(map(cpu_seconds, running(stream, before))) < 2
    batches.close()


def test_errors_of_the_data_come_as_one_line(shard_folder):
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"100 consecutive samples cannot be read: 28 x 28 pixels, more than"):
            list(make_stream(shard_folder, f"data.workers={workers}", "data.max_pixels=100")(range(3)))


def test_buffers_lie_side_by_side(shard_folder):
    data = make_stream(shard_folder).data
    memory = torch.zeros(Buffers.num_bytes(data, 6), dtype=torch.uint8)
    buffers = Buffers.carve(memory, data, 6)
    for number, tensor in enumerate([*buffers.views, *buffers.draws]):
        tensor.fill_(number + 1)
    for number, tensor in enumerate([*buffers.views, *buffers.draws]):
        assert (tensor == number + 1).all()
    assert [tuple(views.shape) for views in buffers.views] == [(2, 6, 3, 28, 28), (1, 6, 3, 20, 20), (1, 6, 3, 16, 16)]
    assert all(views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last) for views in buffers.views)


def test_a_sample_that_was_read_before_its_shard_was_lost_has_its_key(shard_folder, tmp_path):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "cut"))
    reader = ShardReader([Corpus(read_manifest(folder))])
    keys = [reader.key(number) for number in range(3)]
    reader.read(0)
    os.truncate(folder / "train-000000.tar", 4096)
    with pytest.raises(ShardLost):
        for number in range(40):
            reader.read(number)
    assert [reader.key(number) for number in range(3)] == keys and reader.label(0) >= 0
