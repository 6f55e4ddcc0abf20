"""How many images per second a recipe trains on: measured by training for some steps, or the planner's estimate."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from largescale.config import Config
from largescale.plan.planner import Request, plan
from largescale.propose.machine import Machine
from shards.ground.errors import InputError

_STEPS, _FIRST = 12, 4
"""Steps that are trained, and those at first that are not counted: caches are cold and memory is new."""

_BUSY = 0.3
"""CPU cores used by other programs, from which on a measured speed says so: it may be a fraction of the usual one."""

_IDLE, _WAITING = 3, 4
"""Places in a line of /proc/stat of the time in which a core does nothing (`man proc_stat`)."""

_TIMES_PLANNED = 1.5
"""Steps of a ResNet-50 on an H100 took 1.46 and 1.54 times as long as planned (benchmarks/results/gpu_check_*)."""


class Rate(NamedTuple):
    """Images per second of steps, where the figure is from, and seconds of an offline phase: to embed all images, and
    for what is made of them.
    """

    images_per_s: float
    source: str
    embedding_s: float = 0.0
    solving_s: float = 0.0


def planned(config: Config, machine: Machine, images: int) -> Rate:
    """What the planner says from data sheets, less what real steps fell short; no loader that is slower."""
    step = plan(config, Request(machine.gpus, machine.gpu, images=images), advise=False)
    return Rate(
        step["images_per_s"] / _TIMES_PLANNED,
        f"estimated for {machine.gpus} x {machine.gpu} from data sheets, nothing was measured",
        step["offline_phases"].get("seconds", 0.0) * _TIMES_PLANNED,
    )


def measured(recipe: str, machine: Machine) -> Rate:
    """Train by a recipe for some steps, in a process of its own and a folder that is removed, on one GPU or the CPU.

    Args:
        recipe: YAML, with the batch and loaders of one GPU.
        machine: this one; with several GPUs each is taken to be as fast as the one that is measured.

    Raises:
        InputError: the training ends with an error, which is passed on.
    """
    with tempfile.TemporaryDirectory(prefix="largescale-init-") as folder:
        path, run = Path(folder, "recipe.yaml"), Path(folder, "run")
        path.write_text(recipe, encoding="utf-8")
        steps = [f"train.steps={_STEPS}", "run.log_every=1", "checkpoint.every_steps=0", "evaluate.online_every=0"]
        command = [sys.executable, "-m", "largescale", "pretrain", str(path), f"run.dir={run}", *steps]
        environment = os.environ | machine.environment
        before = Usage.now()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        beside = others(before, Usage.now())
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise InputError(f"{_STEPS} steps to measure the speed ended with: {lines[-1].removeprefix('error: ')}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = rate_of(rows, machine.gpus)
    if beside < _BUSY:
        return rate
    return rate._replace(source=f"{rate.source} while other programs used {beside:.1f} of {machine.cores} CPU cores")


class Usage(NamedTuple):
    """Seconds until now: by the clock, of all programs on the CPU cores of this process, and of its ended children."""

    wall: float
    all_programs: float
    children: float

    @classmethod
    def now(cls) -> Usage:
        """Both sums are 0 where the system does not tell (other than Linux)."""
        own = os.times()
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return cls(time.monotonic(), 0.0, 0.0)
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = [list(map(int, line.split()[1:9])) for line in lines if line.split()[0] in cores]
        busy = sum(sum(of_core) - of_core[_IDLE] - of_core[_WAITING] for of_core in ticks)
        return cls(time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own.children_user + own.children_system)


def others(before: Usage, after: Usage) -> float:
    """CPU cores that neither this process nor what it ran and waited for has used in between."""
    wall, all_programs, children = (end - start for start, end in zip(before, after, strict=True))
    return max(0.0, all_programs - children) / max(wall, 1e-9)


def rate_of(rows: list[dict[str, float]], gpus: int) -> Rate:
    """The rate of so many GPUs, of rows that were logged of the steps on one of them, or on a CPU."""
    phaseless = [row for row in rows[_FIRST:] if "phase_s" not in row]  # a row's rate counts the phase before it
    rate = statistics.median(row["images_per_s"] for row in phaseless or rows[_FIRST:])
    source = f"measured here on {len(rows) - _FIRST} steps"
    phases = [row for row in rows if "phase_s" in row]
    embedding = max((row["phase_embedding_s"] for row in phases), default=0.0)  # some phases embed nothing
    solving = statistics.median([row["phase_s"] - row["phase_embedding_s"] for row in phases] or [0.0])
    if gpus > 1:
        source = f"{gpus} times what was {source} on one GPU"
        return Rate(gpus * rate, source, embedding / gpus, solving / gpus)
    return Rate(rate, source, embedding, solving)
