"""A real SLURM with two nodes on this machine, started by launch/slurm/box; launch/slurm/submit sends jobs to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, TINY
from tests.helpers.launcher import pretrain

LAUNCH = ROOT / "launch" / "slurm"


class Box:
    """The SLURM in a box."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_BOX": str(folder / "slurm"),
            "SLURM_BOX_PORT": "17100",
            "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
        }
        self.setup = folder / "setup.sh"
        self.setup.write_text(f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT} OMP_NUM_THREADS=1\n")

    def call(self, *command: object) -> str:
        """Run a command with this SLURM's environment; its output."""
        result = subprocess.run(
            list(map(str, command)),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            cwd=self.folder,
            check=False,
        )
        assert result.returncode == 0, f"{command}:\n{result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *arguments: object) -> str:
        """`launch/slurm/submit` of tests/tiny.yaml on both nodes; the job's number."""
        output = self.call(LAUNCH / "submit", TINY, "--nodes", 2, "--setup", self.setup, *arguments)
        return output.splitlines()[-1]

    def job(self, number: str, key: str) -> str:
        """A field of `scontrol show job`."""
        return re.search(rf"\b{key}=(\S*)", self.call("scontrol", "show", "job", number)).group(1)

    def log(self, number: str) -> str:
        """What a pretraining job has written."""
        path = self.folder / f"pretrain-tiny-{number}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, number: str, holds: Callable[[], bool], timeout_s: float = 600) -> None:
        """Return when something holds; fail with the job's log if it does not."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"{self.call('squeue')}\n{self.log(number)[-4000:]}"
            time.sleep(0.1)

    def wait_for_end(self, number: str, timeout_s: float = 600) -> None:
        """Return when a job is completed."""
        self.wait(number, lambda: self.job(number, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), timeout_s)
        assert self.job(number, "JobState") == "COMPLETED", self.log(number)[-4000:]

    def ranks_of(self, number: str) -> list[int]:
        """Processes of a job's ranks, in order of their ranks."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                entries = dict(entry.partition("=")[::2] for entry in (process / "environ").read_text().split("\0"))
                if entries.get("SLURM_CONF") == self.environment["SLURM_CONF"] and (
                    entries.get("SLURM_JOB_ID") == number and "RANK" in entries
                ):
                    found.setdefault(int(entries["RANK"]), []).append(int(process.name))
        # Loader processes have their rank's environment, and were started later.
        return [min(found[rank]) for rank in sorted(found)]

    def lose_node(self, name: str) -> None:
        """Kill everything of a node at once, as a machine that loses its power, and let SLURM know."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environ = (process / "environ").read_text()
                command = (process / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if f"SLURM_CONF={self.environment['SLURM_CONF']}\0" not in environ:
                continue
            if f"SLURMD_NODENAME={name}\0" in environ or f"slurmd -N {name} " in command:
                os.kill(int(process.name), signal.SIGKILL)
        self.call("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def return_node(self, name: str) -> None:
        """Bring a lost node back."""
        self.call("slurmd", "-N", name)
        deadline = time.monotonic() + 600
        while "DOWN" in (state := self.call("scontrol", "show", "node", name)) or "NOT_RESPONDING" in state:
            assert time.monotonic() < deadline, state
            # Refused for a moment when the node has just registered and is no longer down.
            resume = ["scontrol", "update", f"nodename={name}", "state=resume"]
            subprocess.run(resume, env=self.environment, check=False)
            time.sleep(0.5)


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = Box(tmp_path_factory.mktemp("box"))
    box.environment["PATH"] += ":/usr/sbin"
    box.call(LAUNCH / "box" / "start", 2)
    yield box
    box.call(LAUNCH / "box" / "stop")


@pytest.fixture(scope="session")
def steady(tmp_path_factory, shard_folder, held_out_shards) -> tuple[list[str], Path]:
    """Overrides of a run that takes some seconds, and the folder where it ran through without SLURM."""
    overrides = [
        f"data.shards={shard_folder}",
        f"data.eval_shards={held_out_shards}",
        "train.steps=80",
        "train.precision=fp32",
        "parallel.strategy=fsdp",
        "checkpoint.every_steps=10",
    ]
    run = tmp_path_factory.mktemp("steady") / "undisturbed"
    pretrain([*overrides, f"run.dir={run}"], 2)
    return overrides, run
