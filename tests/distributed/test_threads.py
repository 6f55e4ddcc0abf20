"""Too few threads are one line before anything starts, for a single process and for a launcher of several."""

from __future__ import annotations

import os
import subprocess

import pytest

from largescale.distributed import threads
from shards.ground.errors import InputError
from tests.helpers.commands import TINY, run_python

LIMITED = """
import os, resource, sys
from largescale import cli
from largescale.distributed import start_ranks, threads
threads.require(1)  # loads what is loaded late: others than root may not be able to read it
if os.getuid() == 0:  # whom no such limit holds
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
command = [sys.argv[1], "data.shards=none", "run.dir=none"]
print(cli.main(["pretrain", *command]))
print(start_ranks.main(["--standalone", "--nproc-per-node=2", "-m", "largescale", "pretrain", *command]))
"""


def test_without_threads_a_command_and_a_launcher_end_with_a_line():
    result = run_python("-c", LIMITED, TINY)
    assert result.stdout.split() == ["2", "2"]
    alone, launcher = result.stderr.splitlines()
    for line in (alone, launcher):
        assert line.startswith("error: this process needs ") and "allows it 0: raise" in line
        assert "`ulimit -u`, now 1)" in line
    assert int(launcher.split()[4]) > 2 * int(alone.split()[4])


def test_what_is_held_is_let_go(monkeypatch):
    started = []

    class Process(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Process)
    with threads.allowed(20), pytest.raises(InputError, match="elsewhere"), threads.allowed(20):
        raise InputError("elsewhere")
    assert [one.poll() is None for one in started] == [False, False]


@pytest.mark.parametrize("said, num", [("4", 3), ("4,2", 3), ("1", 0), ("0", None), ("many", None), ("", None)])
def test_libraries_compute_with_as_many_threads_as_they_are_told(said, num, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads.of_math() == (len(os.sched_getaffinity(0)) - 1 if num is None else num)
