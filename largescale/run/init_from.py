"""`init_from`: a new run that starts from the weights of another one.

It takes the parameters and BatchNorm statistics of the method, by name; step, optimizer and queue start at zero, so
length, schedule, rates, crops, strategy and images may all differ. The backbone must be the same. Anything else that
has another shape (say, a head of another width) keeps its random weights, and a line names it.

The network that is evaluated of the other run is what this one starts from: where that is a teacher, and is not here,
its backbone and heads are taken for the student's, of which teachers then start as copies.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import PROGRESS, Checkpoint, newest_first, open_checkpoint
from largescale.config import Config, flatten
from largescale.methods import METHODS
from largescale.methods.method import Method
from largescale.parallel.engine import Engine
from largescale.processes import rank, together, world_size
from shards.ground.errors import InputError

FILE = "init.json"
"""File in the run's folder that records what it started from."""

_BACKBONE = "model.backbone."
_NOT_OF_ITS_SHAPE = ("weights", "mask", "pool", "zero_init_residual", "recompute_stages", "compile_stages")
"""Keys of `model` that a backbone's tensors do not depend on."""
_log = logging.getLogger(__name__)


def take_weights(engine: Engine, config: Config, device: torch.device) -> dict[str, Any]:
    """Load the weights that `init_from` names into an engine that has done no step, under any strategy.

    Returns:
        What was taken, for the run's records: `init_from`, `checkpoint`, `step`, `sha256` (of the checksums of its
        files), `of` (the teacher whose weights they are, or `all`), `taken` (number of tensors), `not_taken` (names).

    Raises:
        InputError: there is no whole checkpoint, or it has another backbone.

    Collectives: every rank must call it; those of loading a checkpoint.
    """
    checkpoint = _open(config.init_from, device)
    state = engine.state()
    stored = together(lambda: sharded.shapes(checkpoint))
    there = {name: shape for name, shape in stored.items() if name.startswith("model.")}
    teacher = _evaluated_teacher(checkpoint, engine.method)
    found = _for_the_student(there, teacher) if teacher else {name: (name, shape) for name, shape in there.items()}
    needed = {name: tuple(value.shape) for name, value in state.items() if name.startswith("model.")}
    shapes = {name: shape for name, (_, shape) in found.items()}
    differ = sorted(name for name in shapes.keys() | needed.keys() if shapes.get(name) != needed.get(name))
    _require_same_backbone(config, checkpoint, differ)
    taken = {found[name][0]: value for name, value in state.items() if name in needed and name not in differ}
    sharded.load(checkpoint, taken)
    engine.take_state(state)
    teachers = tuple(f"model.{average.teacher}." for average in engine.method.averages())
    if any(name.startswith(teachers) for name in differ):
        engine.follow(momentum=0.0)
        differ = [name for name in differ if not name.startswith(teachers)]
    if rank() == 0:
        whose = f", those of its {teacher}, which is what is evaluated there" if teacher else ""
        _log.info("starts from the weights of %s: %d tensors%s", checkpoint.path, len(taken), whose)
        if differ:
            _log.warning(
                "not taken from there, random instead: %s",
                "; ".join(
                    f"{name.removeprefix('model.')} ({_shape(shapes.get(name))} there, {_shape(needed.get(name))} here)"
                    for name in differ
                ),
            )
    return {
        "init_from": config.init_from,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "sha256": sha256_of(checkpoint),
        "of": teacher or "all",
        "taken": len(taken),
        "not_taken": [name.removeprefix("model.") for name in differ],
    }


def _evaluated_teacher(checkpoint: Checkpoint, method: Method) -> str:
    """The module of the other run that holds the network that is evaluated there, such as `teacher`; empty if its
    modules mean here what they mean there.
    """
    theirs = METHODS.get(str(checkpoint.progress["config"].get("method.name")))
    if theirs is None or theirs.encoder_name == method.encoder_name:
        return ""
    return theirs.encoder_name.removesuffix("backbone").removesuffix(".")


def _for_the_student(there: dict[str, tuple[int, ...]], teacher: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors by the names that they get here: those of a teacher under the student's, whose own are left there."""
    prefix = f"model.{teacher}."
    of_teacher = {
        f"model.{name.removeprefix(prefix)}": (name, shape) for name, shape in there.items() if name.startswith(prefix)
    }
    others = {name: (name, shape) for name, shape in there.items() if not name.startswith(prefix)}
    return {**others, **of_teacher}


def require_unchanged(config: Config, before: Mapping[str, Any]) -> None:
    """Refuse another `init_from` for a run that has started.

    Args:
        before: the values that the run was saved with, by key.

    Raises:
        InputError: naming both.
    """
    began = before.get("init_from", "")
    if config.init_from != began:
        raise InputError(
            f"{config.run.dir}: it has already started, from {began or 'random weights'}, and continues from its own "
            f"checkpoint; init_from={config.init_from} is for new runs: use another run.dir, or "
            f"{f'pass init_from={began}' if began else 'leave init_from out'}"
        )


def source_of(where: str) -> Checkpoint | None:
    """The newest checkpoint that `init_from` may mean, judging by marks only; None if there is none."""
    path = Path(where).expanduser()
    if (path / PROGRESS).is_file():
        return open_checkpoint(path)
    return next(iter(newest_first(path / "checkpoints")), None)


def require_source(where: str) -> None:
    """Check that `init_from` names a run that has saved, or one of its checkpoints.

    Raises:
        InputError: it does not.
    """
    if source_of(where) is None:
        path = Path(where).expanduser()
        what = "no checkpoint there" if path.is_dir() else "no such folder"
        if path.is_file():
            what = f"a file; for the weights of a backbone use model.weights={where}"
        raise InputError(
            f"init_from={where}: {what}; pass the folder of a run that has saved, or one of its "
            f"checkpoints (RUN/checkpoints/step-...)"
        )


def _open(where: str, device: torch.device) -> Checkpoint:
    """The whole checkpoint to start from, the same one on all ranks."""
    together(lambda: require_source(where))
    path = Path(where).expanduser()
    if not (path / PROGRESS).is_file():
        try:
            checkpoint = sharded.agree_on_latest(path / "checkpoints", device)
        except InputError as error:
            raise InputError(f"init_from={where}: all checkpoints there are damaged; use another run") from error
    else:
        checkpoint = open_checkpoint(path)
        together(lambda: _require_whole(where, checkpoint))
    assert checkpoint is not None
    return checkpoint


def _require_whole(where: str, checkpoint: Checkpoint | None) -> None:
    assert checkpoint is not None
    if damage := checkpoint.damage(rank(), world_size()):
        raise InputError(f"init_from={where}: {damage}; use another checkpoint of that run")


def _require_same_backbone(config: Config, checkpoint: Checkpoint, differ: list[str]) -> None:
    wrong = [name.removeprefix("model.") for name in differ if name.startswith(_BACKBONE)]
    if wrong:
        there, here = checkpoint.progress["config"], flatten(config)
        keys = [key for key in here if key in there and there[key] != here[key] and _is_of_its_shape(key)]
        raise InputError(
            f"init_from={config.init_from}: has another backbone: {len(wrong)} tensors differ, such as {wrong[0]}; set "
            f"{' '.join(f'{key}={there[key]}'.replace(', ', ',') for key in keys) or 'model.* as there'}"
        )


def _is_of_its_shape(key: str) -> bool:
    return key.startswith("model.") and key.removeprefix("model.") not in _NOT_OF_ITS_SHAPE


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def sha256_of(checkpoint: Checkpoint) -> str:
    """Of the checksums of its files; reads no weights."""
    files = checkpoint.progress["files"]
    return hashlib.sha256("".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files)).encode()).hexdigest()
