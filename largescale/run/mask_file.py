"""`model.mask`: a run that trains only a part of its backbone's weights; the others are zero from first to last step.

The file is safetensors: for each masked parameter of the backbone a bool per weight, true where it is trained, under
the parameter's name in this project. `largescale prune` writes such files (`write_mask`), and so may anybody else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from largescale.checkpoint.from_memory import fill
from largescale.checkpoint.state_file import read_state
from largescale.config import Config
from largescale.models.backbones import build_backbone
from largescale.optim.lars import local_piece
from largescale.parallel.engine import Engine
from largescale.processes import rank, together
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

_BACKBONE = "backbone."
_log = logging.getLogger(__name__)


def read_mask(config: Config) -> dict[str, Tensor]:
    """The masks of `model.mask` by names of the backbone's parameters.

    Raises:
        InputError: it cannot be read, or is of another backbone.
    """
    with torch.device("meta"):
        backbone, _ = build_backbone(config.model)
    try:
        state = read_state(config.model.mask)
        require_fit(state.tensors, backbone)
    except InputError as error:
        raise InputError(f"model.mask={error}") from error
    return state.tensors


def require_fit(masks: Mapping[str, Tensor], backbone: nn.Module) -> None:
    """Check that masks are of the parameters of a backbone.

    Raises:
        InputError: one is not.
    """
    parameters = dict(backbone.named_parameters())
    for name, mask in sorted(masks.items()):
        if name not in parameters:
            raise InputError(f"{name}: no parameter of this backbone; use the mask with the model.* of its run")
        if mask.shape != parameters[name].shape:
            here = list(parameters[name].shape)
            raise InputError(
                f"{name}: {list(mask.shape)} there, {here} in this backbone; use the mask with the model.* of its run"
            )
        if mask.dtype != torch.bool:
            raise InputError(f"{name}: {str(mask.dtype).removeprefix('torch.')}; expected a bool per weight")


def write_mask(path: Path, masks: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a file of masks, whole or not at all; the same masks and metadata give the same bytes.

    Args:
        path: the file.
        masks: bool tensors by names of the backbone's parameters.
        about: metadata.
    """
    content = safetensors.torch.save({name: masks[name].contiguous() for name in sorted(masks)})
    end = 8 + int.from_bytes(content[:8], "little")
    # The library writes metadata in random order.
    header = json.dumps({"__metadata__": dict(sorted(about.items())), **json.loads(content[8:end])}).encode()
    header += b" " * (-len(header) % 8)
    with atomic_write(path) as file:
        file.writelines([len(header).to_bytes(8, "little"), header, memoryview(content)[end:]])


def hash_of(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of what is masked, however a file says it."""
    found = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        found.update(f"{name} {list(mask.shape)}\n".encode())
        found.update(np.packbits(mask.numpy()).tobytes())
    return found.hexdigest()


def share_left(masks: Mapping[str, Tensor]) -> float:
    """Weights that are trained, of those that masks cover."""
    return sum(int(mask.sum()) for mask in masks.values()) / max(1, sum(mask.numel() for mask in masks.values()))


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
    kept = {f"{_BACKBONE}{name}": mask for name, mask in masks.items()}
    if before is None:
        _clear(engine, kept)
        if rank() == 0:
            _log.info("model.mask=%s: %.3g%% of the weights are left", config.model.mask, 100 * record["share_left"])
    engine.mask(kept)
    return record


@torch.no_grad()
def _clear(engine: Engine, kept: dict[str, Tensor]) -> None:
    """Set to zero what is masked, in students and teachers."""
    of_teachers = {
        f"{average.teacher}{name.removeprefix(average.student)}": mask
        for average in engine.method.averages()
        for name, mask in kept.items()
        if name.startswith(f"{average.student}.")
    }
    state = engine.state()
    whole = {f"model.{name}": mask for name, mask in {**kept, **of_teachers}.items()}
    pieces = {name: torch.empty_like(state[name], dtype=torch.bool) for name in whole}
    fill(pieces, whole)
    for name, piece in pieces.items():
        local_piece(state[name]).masked_fill_(~local_piece(piece), 0)
    engine.take_state(state)
