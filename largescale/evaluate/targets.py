"""What is measured: a run, whose newest whole checkpoint is taken, or one of a run's checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from largescale.checkpoint.folder import Checkpoint, find_latest, newest_first, open_checkpoint
from largescale.checkpoint.sharded import CheckpointGone
from largescale.config import Config, DataConfig, flatten, load_config, values_saved_before
from largescale.processes import on_rank_0, rank, together, world_size
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)

_OF_THE_CHECKPOINT = ("model.", "method.", "data.mean", "data.std", "run.seed", "train.precision")
"""Keys (or groups) that describe the weights: the checkpoint knows them, whatever config.yaml has become."""

_FREE = ("model.recompute_stages", "model.compile_stages")

USED = ("evaluate", "data", "model", *_OF_THE_CHECKPOINT)
"""Beginnings of the keys that an evaluation depends on."""

_OF_TRAINING = ("data.augment.", "data.crops", "data.subset", "data.streams")
"""Beginnings of keys of the data that decide how a run is trained, and about no evaluation but those that say so."""

_WINDOW = "data.shuffle_window="

Read = TypeVar("Read")

_ATTEMPTS = 5
"""Checkpoints that may be removed by a run that goes on while they are being read."""


def is_used(override: str, depends_on: tuple[str, ...] = ()) -> bool:
    """Whether an override may change an evaluation that depends on these beginnings of keys besides `USED`."""
    return override.startswith(depends_on) or (override.startswith(USED) and not override.startswith(_OF_TRAINING))


def warn_of_unused(overrides: Sequence[str], depends_on: tuple[str, ...]) -> None:
    """Say which overrides change nothing.

    Args:
        overrides: `key=value` of an evaluation.
        depends_on: beginnings of keys that this one depends on besides `USED`.
    """
    for override in overrides:
        if override.startswith(depends_on):
            continue
        if override.startswith(_WINDOW):
            _log.warning(
                "%s has no effect on an evaluation, unless it trains on images in a store, where it can be lowered: "
                "local ones are shuffled within %d",
                override,
                DataConfig.shuffle_window,
            )
        elif not is_used(override):
            _log.warning("%s has no effect on an evaluation: runs are measured as they were trained", override)


@dataclass(frozen=True)
class Target:
    """A run, or one of its checkpoints.

    Attributes:
        run_dir: folder of the run.
        checkpoint: the one to measure; None takes the newest whole one.
    """

    run_dir: Path
    checkpoint: Checkpoint | None = None

    def read(self, overrides: list[str], read: Callable[[Checkpoint, Config, list[str]], Read]) -> Read:
        """What `read` makes of the checkpoint, its configuration with overrides, and what to warn of.

        Raises:
            InputError: there is no whole one, or an override cannot be used.
        """

        def with_config(checkpoint: Checkpoint) -> Read:
            return read(checkpoint, *config_of(checkpoint, self.run_dir, overrides))

        return read_newest(self.run_dir, with_config) if self.checkpoint is None else with_config(self.checkpoint)

    def agreed(self, overrides: list[str]) -> tuple[Checkpoint, Config, list[str]]:
        """The same for all ranks at once. Collectives: those of `agreed_checkpoint`."""
        checkpoint = self.checkpoint or agreed_checkpoint(self.run_dir)
        return checkpoint, *config_of(checkpoint, self.run_dir, overrides)


def target_at(place: str | Path) -> Target:
    """The run in a folder, or the checkpoint in one of a run's `checkpoints`.

    Raises:
        InputError: neither is there, or the checkpoint is damaged.
    """
    path = Path(place).expanduser()
    if (path / "config.yaml").is_file():
        return Target(path)
    run_dir = path.resolve().parent.parent
    if path.resolve().parent.name != "checkpoints" or not (run_dir / "config.yaml").is_file():
        raise InputError(
            f"{place}: no run here (config.yaml is missing); pass the folder that pretrain wrote, "
            f"RUN/checkpoints/step-... or a file of weights"
        )
    checkpoint = open_checkpoint(path)
    if checkpoint is None:
        known = ", ".join(one.path.name for one in newest_first(run_dir / "checkpoints"))
        raise InputError(f"{place}: no whole checkpoint here; {run_dir} has {known or 'none'}")
    if damage := checkpoint.damage():
        raise InputError(f"{place}: {damage}; take another checkpoint")
    return Target(run_dir, checkpoint)


def read_newest(run_dir: Path, read: Callable[[Checkpoint], Read]) -> Read:
    """What `read` makes of a run's newest checkpoint, or of the next one if a run that goes on removes it before its
    weights are read.

    Several ranks read the one that rank 0 sees, and try once: they cannot begin again each by itself.

    Raises:
        InputError: there is none, or they are removed too fast.

    Collectives: those of `agreed_checkpoint`, if there are several ranks.
    """
    if world_size() > 1:
        return read(agreed_checkpoint(run_dir))
    for _ in range(_ATTEMPTS):
        checkpoint = newest_checkpoint(run_dir)
        try:
            return read(checkpoint)
        except CheckpointGone:
            _log.info("%s was removed while being read, since the run goes on; taking the newest", checkpoint.path)
    raise InputError(f"{run_dir}: its checkpoints are replaced faster than they can be read; raise checkpoint.keep")


def newest_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest whole checkpoint of a run.

    Raises:
        InputError: there is none.
    """
    checkpoint = find_latest(run_dir / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{run_dir}: no whole checkpoint; run `largescale pretrain` with this run.dir first")
    return checkpoint


def agreed_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest checkpoint that rank 0 sees: a run that goes on may write another one meanwhile.

    Raises:
        InputError: there is none, or this rank cannot see it.

    Collectives: every rank must call it; a broadcast of an object, and a gather of what went wrong.
    """
    checkpoint = on_rank_0(lambda: newest_checkpoint(run_dir))

    def require() -> None:
        if rank() > 0 and open_checkpoint(checkpoint.path) is None:
            raise InputError(f"{checkpoint.path}: cannot be read on every rank; do all ranks share {run_dir}?")

    together(require)
    return checkpoint


def config_of(checkpoint: Checkpoint, run_dir: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """A run's configuration with what describes the weights as the checkpoint has it, and a line where that differs.

    Raises:
        InputError: config.yaml or an override cannot be used.
    """
    path = run_dir / "config.yaml"
    config = load_config(path)
    written, saved = flatten(config), values_saved_before(checkpoint.progress["config"], config)
    about_weights = [key for key in written if key.startswith(_OF_THE_CHECKPOINT) and key not in _FREE]
    edited = {key: saved[key] for key in about_weights if key in saved and saved[key] != written[key]}
    lines = [
        f"{path} has {key}={written[key]}, but the checkpoint was trained with {value}, which is used; pass "
        f"{key}=... to override it"
        for key, value in edited.items()
    ]
    given = {override.split("=", 1)[0] for override in overrides}
    return (
        load_config(path, [*(f"{key}={json.dumps(value)}" for key, value in edited.items()), *overrides]),
        [line for key, line in zip(edited, lines, strict=True) if key not in given],
    )
