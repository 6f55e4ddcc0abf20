"""The weights that a new run starts from: random ones, all of another run's, or a backbone that others trained.

`init_from` takes heads and statistics of a run of this project too (`run/init_from.py`); `model.weights`
takes a backbone, whoever trained it, and leaves the rest random.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from largescale.checkpoint.folder import stamp_of
from largescale.checkpoint.foreign import Taken, take
from largescale.checkpoint.from_memory import fill
from largescale.checkpoint.state_file import read_state
from largescale.config import Config
from largescale.models.backbones import build_backbone
from largescale.parallel.engine import Engine
from largescale.processes import on_rank_0, rank, together
from largescale.run import init_from
from shards.ground.errors import InputError

_BACKBONE = "model.backbone."
_SAME = 0.005
"""Normalisations that differ by less are taken to be the same: 0.228 and 0.229 are both in use for red."""

_log = logging.getLogger(__name__)


def first_weights(engine: Engine, config: Config, device: torch.device) -> dict[str, Any]:
    """Put the weights that a new run starts from into an engine that has done no step, under any strategy.

    Returns:
        What was taken, for the run's records; empty for random weights.

    Raises:
        InputError: they cannot be read, or are of another backbone.

    Collectives: every rank must call it; those of loading a checkpoint.
    """
    if config.init_from:
        return init_from.take_weights(engine, config, device)
    return _take_backbone(engine, config) if config.model.weights else {}


def read_backbone(config: Config) -> Taken:
    """The tensors that `model.weights` holds for the backbone; they stay on the disk as far as the format allows.

    Raises:
        InputError: it cannot be read, or does not hold the backbone.
    """
    with torch.device("meta"):
        backbone, _ = build_backbone(config.model)
    try:
        return take(read_state(config.model.weights), backbone, config.model)
    except InputError as error:
        raise InputError(f"model.weights={error}") from error


def _take_backbone(engine: Engine, config: Config) -> dict[str, Any]:
    """Every rank reads the file itself and keeps its pieces."""
    found: list[Taken] = []
    together(lambda: found.append(read_backbone(config)))
    [taken] = found
    state = engine.state()
    tensors = {f"{_BACKBONE}{name}": tensor for name, tensor in taken.tensors.items()}
    fill({name: state[name] for name in tensors}, tensors)
    engine.take_state(state)
    engine.follow(momentum=0.0)
    if rank() == 0:
        _log.info("model.weights=%s: %s", config.model.weights, taken.summary())
        _warn_of_normalisation(taken, config)
    return {
        "weights": config.model.weights,
        "sha256": _sha256(config.model.weights),
        "layout": taken.layout,
        "taken": len(taken.tensors),
        "left": len(taken.left),
        "mean": taken.mean,
        "std": taken.std,
    }


def _sha256(weights: str) -> str:
    """Of the file, read by rank 0 alone. Collectives: a broadcast of an object."""
    return on_rank_0(lambda: stamp_of(read_state(weights).path).sha256)


def _warn_of_normalisation(taken: Taken, config: Config) -> None:
    pairs = [*zip(taken.mean, config.data.mean, strict=True), *zip(taken.std, config.data.std, strict=True)]
    if any(abs(theirs - ours) > _SAME for theirs, ours in pairs):
        _log.warning(
            "model.weights=%s was trained on images normalised with other numbers than these; pass data.mean=%s "
            "data.std=%s",
            config.model.weights,
            str(taken.mean).replace(" ", ""),
            str(taken.std).replace(" ", ""),
        )
