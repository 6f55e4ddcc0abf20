"""A rank that is asked to stop does not sit out what it waits for, without loader processes too.

Covers: shards/ground/pauses.py
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from largescale.data.cache_files import locked
from largescale.distributed import stopping
from largescale.distributed.stopping import StoppedWaiting
from shards.ground import pauses
from shards.stores import store
from tests.helpers.servers import web_server
from tests.helpers.streams import make_stream

WAITS = ("data.store_patience_s=100000", "data.store_stall_s=100000")
SAYS = "while waiting for data; steps since the last checkpoint will be repeated"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the command has it while steps are done; what a test notes of signals and time is forgotten after it."""
    monkeypatch.setattr(pauses, "_checks", [stopping.leave_without_data])
    for name in ("_received", "_since", "_give_up_at"):
        monkeypatch.setattr(stopping, name, [])
    with stopping.in_steps(lambda state, why: None):
        yield


def asked_long_ago() -> None:
    stopping._received.append("SIGTERM")
    stopping._since.append(time.monotonic() - 100)


def time_is_over() -> None:
    stopping.reason(left_s=10, margin_s=120)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ask, who", [(asked_long_ago, "SIGTERM"), (time_is_over, "the end of its time")])
def test_for_a_folder_that_is_away(shard_folder, tmp_path, training, ask, who, threads):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "shards"))
    stream = make_stream(folder, *WAITS, "data.workers=0", f"data.threads={threads}")
    folder.rename(tmp_path / "away")
    ask()
    with pytest.raises(StoppedWaiting, match=f"stopped by {who} {SAYS}"):
        next(stream(range(3)))


@pytest.mark.parametrize("how", ["fails", "hangs", "is fetched by another process"])
def test_for_a_store(shard_folder, tmp_path, training, how):
    with web_server(Path(shutil.copytree(shard_folder, tmp_path / "served"))) as web:
        stream = make_stream(web.url, *WAITS, "data.workers=0", f"data.cache={tmp_path / 'cache'}")
        cache = stream.corpora[0].cache
        asked_long_ago()
        if how == "fails":
            web.answer = lambda request: request.send_error(503)
        if how == "hangs":
            web.hangs = 1000
        with pytest.raises(StoppedWaiting, match=f"stopped by SIGTERM {SAYS}"):
            if how == "is fetched by another process":
                tar = cache.manifest.tar_path(0)
                with locked(tar.with_name(f".{tar.stem}.lock")):
                    cache.get(0)
            else:
                cache.get(0)


def test_for_a_command(training, tmp_path, monkeypatch):
    monkeypatch.setenv(store.ALLOW_PIPE, "1")
    asked_long_ago()
    with pytest.raises(StoppedWaiting):
        store.Store("pipe:sleep 100000; echo {name}", stall_s=100000).read("a")


def test_a_signal_leaves_time_for_a_last_step_and_a_start_ends_at_once(training, monkeypatch):
    stopping._received.append("SIGTERM")
    stopping._since.append(time.monotonic())
    pauses.pause(0.01)
    stopping._training.clear()
    with pytest.raises(StoppedWaiting, match=r"stopped by SIGTERM while waiting for data$"):
        pauses.pause(100000)


def test_processes_that_load_for_it_are_not_asked(training):
    asked_long_ago()
    time_is_over()
    if not (child := os.fork()):
        stopping.live_and_die_with_parent()
        pauses.pause(0.01)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("ask", [asked_long_ago, time_is_over])
def test_a_long_step_is_not_a_wait(training, ask):
    """A batch may still come after a step, or a save, that took longer than there was time left."""
    ask()
    with pytest.raises(StoppedWaiting):
        stopping.leave_without_data(time.monotonic() - 20)
    stopping.leave_without_data(time.monotonic())


def test_a_reason_to_stop_is_no_answer_of_a_store(training):
    asked_long_ago()
    with pytest.raises(StoppedWaiting, match="SIGTERM"):
        store.Store("memory://nowhere", patience_s=0)._patiently("x", lambda: 1 / 0)
