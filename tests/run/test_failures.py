"""What a command says where it ends with an error."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import resource
import subprocess
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch.distributed as dist

from largescale.run.failures import end_of, is_lost_rank, reason_of, told

FILES = "Too many open files; raise the limit on open files (`ulimit -n`)"
THREADS = "raise the limits on processes and memory (`ulimit -u`, `-v`), or lower data.workers, data.threads"


def start_under_a_limit(sending: Connection) -> None:
    """What is said where a user may start no more processes."""
    context = multiprocessing.get_context("fork")
    starts: list[Callable[[], object]] = [lambda: subprocess.run(["true"]), context.Process(target=print).start]
    if os.getuid() == 0:  # whom no such limit holds
        os.setresuid(65534, 65534, 65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    said = []
    for start in starts:
        try:
            start()
        except OSError as error:
            said.append(end_of(error))
    sending.send(said)


def test_too_few_open_files_are_a_line_also_where_a_library_meets_the_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    store = dist.HashStore()
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, before[1]))  # gloo asks for more at once
    try:
        with pytest.raises(RuntimeError) as of_gloo:
            dist.ProcessGroupGloo(store, 0, 1)
        with pytest.raises(OSError) as of_python:
            open("/dev/null"), open("/dev/null")  # noqa: SIM115
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert end_of(of_gloo.value) == (FILES, True) and reason_of(of_gloo.value) == FILES
    assert end_of(of_python.value) == (f"/dev/null: {FILES}", True)


def test_too_few_threads_are_a_line():
    before = threading.stack_size(2**40)  # no address space has room for it
    try:
        with pytest.raises(RuntimeError) as error:
            threading.Thread(target=print).start()
    finally:
        threading.stack_size(before)
    assert end_of(error.value) == (f"can't start new thread; {THREADS}", True)
    assert end_of(RuntimeError(os.strerror(errno.EAGAIN)))[0] == f"Resource temporarily unavailable; {THREADS}"
    assert end_of(RuntimeError("a fault of the program")) is None


def test_what_else_is_temporarily_unavailable_is_not_laid_to_threads(tmp_path):
    with open(tmp_path / "file", "w") as file, open(tmp_path / "file") as other:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError) as locked:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for name, shown in ((None, "a file"), (str(tmp_path / "file"), str(tmp_path / "file"))):
        locked.value.filename = name
        line, by_input = end_of(locked.value)
        assert (
            line.startswith(f"{shown}: Resource temporarily unavailable; another process may hold a lock") and by_input
        )
        assert "ulimit" not in line and reason_of(locked.value) == line
    assert THREADS not in str(end_of(RuntimeError("[pair.cc:144] read: Resource temporarily unavailable")))


def test_a_process_that_cannot_be_started_is_laid_to_its_limit():
    receiving, sending = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=start_under_a_limit, args=(sending,))
    child.start()
    assert receiving.recv() == [(f"Resource temporarily unavailable; {THREADS}", True)] * 2
    child.join()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:6355. GLHF!"),
        RuntimeError("[/src/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
        dist.DistStoreError("wait timeout after 1800000ms, keys: /default_pg/0//cpu//0/0"),
        dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94\nncclRemoteError: possibly a remote process exiting"),
    ],
)
def test_a_rank_that_lost_another_says_where_the_reason_is_and_what_it_met(error):
    says = "lost another rank; that one's own lines say why, or the launcher's where it was killed"
    line = f"{says} ({' '.join(str(error).split())})"
    assert is_lost_rank(error) and end_of(error) == (line, False) and reason_of(error) == line


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, invalid usage\nLast error:\nno socket interface found"),
        dist.DistNetworkError("The server socket has failed to listen on any local network address. port: 29500"),
    ],
)
def test_what_all_ranks_meet_alike_is_told_in_full(error):
    line = f"{type(error).__name__}: {' '.join(str(error).split())}; NCCL_DEBUG=WARN shows more"
    assert not is_lost_rank(error) and end_of(error) == (line, False) and reason_of(error) == line
    said = []
    with pytest.raises(dist.DistError), told(lambda state, why: said.append((state, why)), lambda: "failed"):
        raise error
    assert said == [("failed", line)]


@pytest.mark.parametrize(
    "written, last", [("failed", "failed: why"), ("stopped", "stopped: why"), ("running", "failed")]
)
def test_a_rank_that_lost_another_leaves_what_that_one_wrote(written, last):
    said = [f"{written}: why"]
    with pytest.raises(dist.DistError), told(lambda state, why: said.append(state), lambda: said[-1].partition(":")[0]):
        raise dist.DistNetworkError("Connection closed by peer")
    assert said[-1] == last
