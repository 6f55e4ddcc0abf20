"""Files of masks, for `model.mask`: which weights of a backbone are trained, the others being zero.

Such a file is safetensors: for each masked parameter of the backbone a bool per weight, true where it is trained, under
the parameter's name in this project. `largescale prune` writes such files (`write_mask`), and so may anybody else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from largescale.checkpoint.state_file import read_state
from largescale.config import Config
from largescale.methods.method import Method
from largescale.models.backbones import build_backbone
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

_BACKBONE = "backbone."


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


def read_about(path: Path) -> dict[str, str]:
    """The metadata of a file of masks, which are not read; empty if there is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return {}


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


def by_tensor(method: Method, masks: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Which mask belongs to which tensor of a training's state: weights, their optimizer state, and teachers' weights.

    Args:
        method: whose state it is.
        masks: by names of the backbone's parameters.
        shapes: of all tensors of the state, by canonical name.
    """
    found = {}
    for name, mask in masks.items():
        own = f"{_BACKBONE}{name}"
        found[f"model.{own}"] = mask
        for average in method.averages():
            if own.startswith(f"{average.student}."):
                found[f"model.{average.teacher}{own.removeprefix(average.student)}"] = mask
        found |= {
            key: mask
            for key, shape in shapes.items()
            if key.startswith(f"optimizer.{own}.") and shape == tuple(mask.shape)
        }
    return found
