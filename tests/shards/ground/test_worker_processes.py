"""Worker processes: their troubles are a line for the user, and none outlives its command."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.ground import worker_processes
from shards.ground.errors import InputError
from shards.ground.worker_processes import over
from shards.sources.source import open_source
from tests.helpers.commands import ROOT


def square(number: int) -> int:
    return number * number


def be_killed(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def need_memory(number: int) -> int:
    if number == 2:
        raise MemoryError("an image of 4000 x 3000 pixels")
    return number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    assert list(over(square, range(7), workers)) == [0, 1, 4, 9, 16, 25, 36]


def test_a_killed_worker_is_a_line_and_leaves_no_process():
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError, match=r"a worker process was killed, .* memory ran out; .* fewer --workers"):
        list(over(be_killed, range(50), 2))
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_too_little_memory_is_a_line(workers):
    with pytest.raises(InputError, match=r"memory ran out \(an image of 4000 x 3000 pixels\); .* fewer --workers"):
        list(over(need_memory, range(5), workers))


@pytest.mark.parametrize(
    "number, says",
    [
        (errno.ENOSPC, "/dev/shm: No space left on device, .*--workers 1"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EAGAIN, "2 worker processes cannot be started .* fewer --workers"),
    ],
)
def test_processes_that_cannot_be_started_are_a_line(monkeypatch, number, says):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(worker_processes, "ProcessPoolExecutor", refuse)
    with pytest.raises(InputError, match=says):
        list(over(square, range(5), 2))


INTERRUPTED = """
import os, signal, sys, time
from shards import cli
from shards.ground import terminal, worker_processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever starts the tests may ignore it

def stall(number):
    os.write(1, f"{number}\\n".encode())  # in one piece, unlike print
    time.sleep(100)

def run(*_):
    for _ in worker_processes.over(stall, range(4), 2):
        pass

cli._merge = run
sys.argv[1:] = ["merge", "x"]
sys.exit(terminal.run(cli.main, None))
"""


def test_an_interrupt_ends_at_once_with_a_line(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        assert {command.stdout.readline().strip() for _ in range(2)} == {"0", "1"}
        os.killpg(command.pid, signal.SIGINT)
        _, stderr = command.communicate(timeout=60)  # far less than the workers would take
    assert (command.returncode, stderr) == (130, "error: interrupted; run the same command again\n")


def test_too_few_open_files_are_a_line(tmp_path):
    (tmp_path / "in").mkdir()
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12));"
    arguments = ["convert", "in", "out", "--workers", "4", "--samples-per-shard", "1"]
    command = f"{few} from shards.cli import main; raise SystemExit(main({arguments!r}))"
    for number in range(8):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(b"x")
    result = subprocess.run(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "Traceback" not in result.stderr and result.returncode == 2, result.stderr


def test_folders_may_lie_deeper_than_the_stack(tmp_path):
    depth, before = sys.getrecursionlimit() + 10, os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("x.jpg").write_bytes(b"x")
        [found] = open_source(tmp_path).list()
        assert found.place == "d/" * depth + "x.jpg"
    finally:
        os.chdir(before)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own removal is recursive
