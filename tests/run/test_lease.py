"""One owner a folder, with real processes that die, stand still, or all come at once.

Covers: largescale/run/owner.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from largescale.config import load_config
from largescale.distributed import stopping
from largescale.distributed.stopping import StoppedWaiting
from largescale.pretrain import pretrain
from largescale.run.lease import FolderLost, Lease, take_folder
from largescale.run.owner import job_began, newest_owner, owner_numbers, owner_path, parse_owner
from shards.ground.errors import InputError
from tests.helpers.commands import TINY
from tests.helpers.runs import move_elsewhere

LEASE_S = 0.4


def take(run: Path, wait_s: float = 0.0) -> Lease:
    return take_folder(run, lease_s=LEASE_S, wait_s=wait_s)


def in_child(action: Callable[[], int]) -> int:
    """Start `action` in a process that dies with its result as exit code, giving nothing up; its number."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left_behind(run: Path) -> None:
    """A folder whose owner was killed."""
    assert code_of(in_child(lambda: take(run) and 0)) == 0
    assert owner_numbers(run) == [1]


class Joining(Exception):
    """A process was about to join the others."""


@pytest.mark.parametrize("hang_timeout_s", [0, 60])
def test_ranks_wait_longer_than_rank_0_for_a_folder(tiny_overrides, monkeypatch, hang_timeout_s):
    joins = []

    def join(*_: object, timeout: timedelta, **_more: object) -> None:
        joins.append(timeout)
        raise Joining

    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(Joining):
        pretrain(load_config(TINY, tiny_overrides("run.owner_wait_s=9e5", f"run.hang_timeout_s={hang_timeout_s}")))
    assert joins[0] > timedelta(seconds=9e5)


def test_a_folder_is_made_owned_and_given_up(tmp_path):
    run = tmp_path / "a" / "run"
    lease = take(run)
    number, content = newest_owner(run)
    assert number == lease.number == 1 and parse_owner(content).pid == os.getpid()
    lease.verify()
    assert parse_owner(newest_owner(run)[1]).renewals > 0
    lease.release()
    assert not run.exists() and run.parent.is_dir()


def test_what_others_wrote_stays(tmp_path):
    lease = take(tmp_path)
    (tmp_path / "file").touch()
    lease.release()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_owner_that_lives_is_named(tmp_path):
    lease = take(tmp_path)
    with pytest.raises(InputError, match=rf"process {os.getpid()} on \S+, since \d.* is training there"):
        take(tmp_path)
    lease.verify()
    lease.release()


def test_a_killed_owner_is_followed_at_once(tmp_path, caplog):
    left_behind(tmp_path)
    lease = take(tmp_path)
    assert lease.number == 2 and owner_numbers(tmp_path) == [2] and "its process is gone" in caplog.text
    lease.release()


def test_an_owner_on_another_machine_is_followed_after_its_lease(tmp_path, caplog):
    left_behind(tmp_path)
    move_elsewhere(tmp_path)
    lease = take(tmp_path)
    assert lease.number == 2 and "on n7, since" in caplog.text and "(silent for" in caplog.text
    lease.release()


def test_an_owner_on_another_machine_that_lives_is_not(tmp_path):
    owner = take(tmp_path)
    owner._owner = replace(owner._owner, machine="elsewhere", host="n7")
    owner.renew()
    with pytest.raises(InputError, match="on n7, since"):
        take(tmp_path)
    owner.release()


def test_a_newcomer_waits_for_the_end_of_the_owner(tmp_path):
    ready, go = os.pipe()

    def train() -> int:
        lease = take(tmp_path)
        os.write(go, b"x")
        time.sleep(2 * LEASE_S)
        lease.release()
        return 0

    child = in_child(train)
    os.read(ready, 1)
    lease = take(tmp_path, wait_s=60)
    assert code_of(child) == 0
    lease.verify()
    lease.release()


def test_of_many_newcomers_exactly_one_wins(tmp_path):
    left_behind(tmp_path)
    move_elsewhere(tmp_path)
    ready, done = os.pipe()

    def come() -> int:
        try:
            lease = take(tmp_path)
        except InputError:
            return 2
        os.read(ready, 1)  # lives until all others have given up
        lease.verify()
        return 0

    children = [in_child(come) for _ in range(8)]
    codes = []
    while len(codes) < 7:
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    os.write(done, b"x")
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
    assert sorted(codes) == [0, 2, 2, 2, 2, 2, 2, 2] and len(children) == 8
    assert owner_numbers(tmp_path) == [2]


def stand_still(lease: Lease) -> None:
    """As a process that was stopped: it renews nothing, and does not notice."""
    lease._ended.set()
    lease._thread.join()


def test_who_was_silent_for_too_long_stops_before_it_writes(tmp_path):
    former = take(tmp_path)
    stand_still(former)
    lease = take(tmp_path)
    former._renewed -= LEASE_S  # the time that passed while it was stopped
    with pytest.raises(FolderLost, match=rf"now belongs to process {os.getpid()} on .*writes nothing more"):
        former.check()
    with pytest.raises(FolderLost):
        former.verify()
    assert not former.still_ours() and lease.still_ours()
    former.release()
    lease.verify()
    assert owner_numbers(tmp_path) == [2]
    lease.release()


def test_a_disk_that_is_away_or_full_does_not_end_a_training(tmp_path, monkeypatch):
    run = tmp_path / "run"
    lease = take(run)
    shutil.move(run, tmp_path / "away")
    lease.verify()
    shutil.move(tmp_path / "away", run)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        lease.verify()
    lease.verify()
    owner_path(run, 1).unlink()
    with pytest.raises(FolderLost, match="is gone"):
        lease.verify()
    lease.release()


def test_a_full_disk_that_has_no_room_for_an_owner_is_named(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as refused:
        take(tmp_path)
    assert refused.value.filename == str(owner_path(tmp_path, 1)) and owner_numbers(tmp_path) == []


def test_a_newcomer_that_is_asked_to_stop_stops_in_order(tmp_path, monkeypatch):
    lease = take(tmp_path)
    monkeypatch.setattr(stopping, "_received", ["SIGTERM"])
    monkeypatch.setattr(stopping, "_since", [0.0])
    with pytest.raises(StoppedWaiting, match=rf"stopped by SIGTERM while waiting for process {os.getpid()} on "):
        take(tmp_path, wait_s=60)
    lease.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"token": 1}', b"\xff\0"])
def test_a_file_that_was_cut_is_no_owner(content):
    assert parse_owner(content) is None


def test_a_time_limit_goes_on_where_torchrun_starts_a_rank_again(monkeypatch):
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as later:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        for launcher in (later.pid, os.getpid()):  # this process had to load torch before
            monkeypatch.setattr(os, "getppid", lambda launcher=launcher: launcher)
            assert (job_began() > before - 0.1) == (launcher == later.pid)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert job_began() >= before
        later.communicate(b"\n")
