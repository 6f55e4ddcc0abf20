"""What to do about a run that cannot continue as it is: overrides that work from where it stands, ready to type.

A resumed run may not change what it computes, so "a lower rate" means a new run that starts from its weights.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np

from largescale.checkpoint.folder import Checkpoint, newest_first
from largescale.config import Config
from largescale.parallel.precision import AUTOCAST
from shards.ground.files import NO_ROOM

_LOWER = 4
"""Divides a learning rate that made the loss infinite; with a smaller factor the run may well end there again."""

_OF_THE_BACKBONE = (
    "model.backbone",
    "model.stem",
    "model.depths",
    "model.width",
    "model.block",
    "model.sobel",
    "model.norm",
    "model.weights",
)
"""Settings whose change makes weights unusable for a new run."""


def new_run(config: Config, checkpoint: Checkpoint | None = None) -> str:
    """Overrides that start another run from the weights of this one, in an unused folder."""
    run = Path(os.path.abspath(config.run.dir))  # `.` has no name
    free = next(path for number in itertools.count(2) if not (path := run.with_name(f"{run.name}-{number}")).exists())
    without = " model.weights=" if config.model.weights else ""  # what that run had begun with
    mirror = config.checkpoint.mirror.rstrip("/")
    in_bucket = "://" in mirror and "/" not in mirror.partition("://")[2]  # a bucket beside it may not exist
    other_mirror = f"{mirror}/{free.name}" if in_bucket else f"{mirror}{free.name.removeprefix(run.name)}"
    other = f" checkpoint.mirror={other_mirror}" if mirror else ""
    return f"init_from={checkpoint.path if checkpoint else run} run.dir={free}{other}{without}"


def after_failed_saves(why: str) -> str:
    """What to do if checkpoints cannot be saved: not every failure is a full disk."""
    full = any(os.strerror(number) in why for number in NO_ROOM)
    return f"{'make room there' if full else 'fix that'} and run the same command again"


def instead_of_changing(config: Config, key: str) -> str:
    """What to do if a run cannot continue with another value of a setting."""
    if key.startswith(_OF_THE_BACKBONE):
        return "use another run.dir"
    return f"start a new run from its weights: {new_run(config)}"


def after_bad_step(
    config: Config, *, step: int, trouble: str, rates: np.ndarray, checkpoints: Path, num_rollbacks: int
) -> str:
    """How a run can continue after a step that was not finite.

    Args:
        config: of the run.
        step: the bad one.
        trouble: what was wrong, as `Engine.check` describes it.
        rates: the learning rate of every step.
        checkpoints: the run's folder of them.
        num_rollbacks: how often it has gone back already.
    """
    run, saved = Path(config.run.dir), newest_first(checkpoints)
    data_is_bad, back = "views" in trouble, f"train.max_rollbacks={num_rollbacks + 1}"
    if not saved:
        what = _slower(config, config.optim.lr / _LOWER)
        if data_is_bad and step > 0:
            what = f"run the same command with checkpoint.every_steps={max(1, step // 2)} {back}"
        elif data_is_bad:
            what = f"leave the images that {run}/trouble lists out (data.subset)"
        return f"Nothing is saved yet: {what}"
    again = f"run the same command with {back}, which leaves the data of such steps out"
    if data_is_bad:
        return f"The last checkpoint is good, the data is not: {again}"
    # Weights saved just before the bad step may be the problem.
    before = next((checkpoint for checkpoint in saved if checkpoint.step < step), None)
    source = before or saved[0]
    rate = min(config.optim.lr / _LOWER, float(rates[source.step - 1]) or config.optim.lr)
    lower = _slower(config, rate, f"{new_run(config, None if source is saved[0] else source)} ")
    if before is not saved[0]:
        return f"To go on from step {source.step}: {lower}"
    return f"The last checkpoint is good. If the rate is too high: {lower}. If the data is bad: {again}"


def _slower(config: Config, rate: float, new: str = "") -> str:
    half = " (or train.precision=fp32)" if config.train.precision in AUTOCAST else ""
    return f"run the same command with {new}optim.lr={rate:.2g}{half}"


def about_copy(path: Path, run_dir: Path) -> str:
    """A line about a run folder that was copied or moved, whose config.yaml still names the old place; else empty.

    Args:
        path: of the configuration.
        run_dir: that it names.
    """
    here = path.parent
    if path.name != "config.yaml" or not (here / "checkpoints").is_dir() or here.resolve() == run_dir.resolve():
        return ""
    return (
        f"warning: {path} says run.dir={run_dir}, so the run continues there, not in {here}; to "
        f"continue here, pass run.dir={here}\n"
    )
