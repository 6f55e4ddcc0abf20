"""Commands that Ctrl-C or SIGTERM ends: a line, its exit code, nothing half done under a name, no process left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

LINE = {
    signal.SIGINT: r"error: interrupted.*\n",
    signal.SIGTERM: r"error: ended by SIGTERM; run the same command again\n",
}
BUSY = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from shards.ground import terminal
from shards.ground.files import atomic_write
from shards.ground.worker_processes import over

def sleep(seconds):
    Path(f"worker-{{os.getpid()}}").touch()
    time.sleep(seconds)

def command(argv):
    try:
        with atomic_write(Path("result")) as file:
            file.write(b"half")
            list(over(sleep, [60, 60], 2))
    except KeyboardInterrupt:
        return terminal.fail_line("interrupted", 130)

if __name__ == "__main__":
    sys.exit(terminal.run(command, None))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["the command", "all its processes"])
def test_a_command_with_processes(tmp_path, number, whom):
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 600
    while len(workers := [int(path.name[7:]) for path in tmp_path.glob("worker-*")]) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (os.kill if whom == "the command" else os.killpg)(process.pid, number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 128 + number and re.fullmatch(LINE[number], said), said
    assert {path.name for path in tmp_path.iterdir()} == {f"worker-{worker}" for worker in workers}
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_real_commands_wherever_they_are(tmp_path, sample_images, number):
    commands = [
        ["shards", "convert", str(sample_images), str(tmp_path / "shards"), "--force"],
        ["largescale", "plan", str(ROOT / "configs/seer/regnety_10b.yaml"), "--gpus", "496"],
    ]
    for place, command in enumerate(commands):
        process = met_at_work(command, number)
        time.sleep(0.1 + 0.3 * place)
        os.killpg(process.pid, number)
        result, said = process.communicate(timeout=600)
        if process.returncode in (0, -number):  # it has just been done, and may have been on its way out
            assert result.strip() and "error" not in said
        else:
            assert process.returncode == 128 + number and "Traceback" not in said, said
            assert re.fullmatch(LINE[number], said.splitlines(keepends=True)[-1])
    assert not list(tmp_path.rglob("*.writing"))


def met_at_work(command: list[str], number: int) -> subprocess.Popen[str]:
    """A command that listens to a signal; one that is done before it is looked at (a busy machine) is run again."""
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        while process.poll() is None:
            if handles(process.pid, number):
                return process
            time.sleep(0.002)
        result, said = process.communicate()
        assert process.returncode == 0, result + said
    raise AssertionError(f"{command}: always done before it could be met")


def handles(pid: int, number: int) -> bool:
    """Whether a command has begun to listen: Python itself has a handler of Ctrl-C from the start, of SIGTERM none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1 and caught >> (number - 1) & 1)
