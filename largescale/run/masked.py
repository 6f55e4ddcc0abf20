"""`model.mask`: a run that trains a part of its backbone's weights; the others are zero from first to last step."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from largescale.checkpoint.from_memory import fill
from largescale.checkpoint.mask_file import by_tensor, hash_of, read_mask, share_left
from largescale.config import Config
from largescale.optim.lars import local_piece
from largescale.parallel.engine import Engine
from largescale.processes import rank, together
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)


def take_mask(engine: Engine, config: Config, before: dict[str, Any] | None) -> dict[str, Any]:
    """Let an engine train only what `model.mask` leaves; every weight for a run without one.

    Args:
        engine: with its first weights, or the state of its checkpoint.
        config: of the run.
        before: what this function returned when the run began, from its checkpoint; None for a new run, whose
            weights and teachers are set to zero where the mask says so.

    Returns:
        What was taken, for the run's records; empty without a mask.

    Raises:
        InputError: the file cannot be read or is of another backbone, or the run began with another mask.

    Collectives: every rank must call it; those of the engine's state.
    """
    masks = together(lambda: read_mask(config)) if config.model.mask else {}
    record: dict[str, Any] = {"sha256": hash_of(masks), "share_left": share_left(masks)} if masks else {}
    if before is not None and before.get("sha256", "") != record.get("sha256", ""):
        began = f"the mask {before['sha256'][:12]}" if before else "no mask"
        now = f"model.mask={config.model.mask} is {record['sha256'][:12]}" if masks else "model.mask is empty"
        raise InputError(f"{config.run.dir}: it began with {began}, and {now}; set it back, or use another run.dir")
    if not masks:
        return {}
    if before is None:
        _clear(engine, masks)
        if rank() == 0:
            _log.info("model.mask=%s: %.3g%% of the weights are left", config.model.mask, 100 * record["share_left"])
    engine.mask({f"backbone.{name}": mask for name, mask in masks.items()})
    return record


@torch.no_grad()
def _clear(engine: Engine, masks: dict[str, Tensor]) -> None:
    """Set to zero what is masked, in students and teachers."""
    state = engine.state()
    whole = by_tensor(engine.method, masks, {name: tuple(value.shape) for name, value in state.items()})
    pieces = {name: torch.empty_like(state[name], dtype=torch.bool) for name in whole}
    fill(pieces, whole)
    for name, piece in pieces.items():
        local_piece(state[name]).masked_fill_(~local_piece(piece), 0)
    engine.take_state(state)
