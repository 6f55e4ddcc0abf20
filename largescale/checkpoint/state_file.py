"""Tensors of a file that others wrote: safetensors, or what torch.save made, read without running code that it holds.

A pickle can run anything. `torch.load(weights_only=True)` builds tensors, containers and a short list of harmless
types, to which `argparse.Namespace` is added here, since many old training scripts saved their arguments. A file that
holds another object is refused by its name.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shards.ground.errors import InputError

_ZIP = b"PK\x03\x04"
_WEIGHTS_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
_MOST_HEADER_BYTES = 100 * 2**20  # what safetensors itself allows
_DEEPEST = 32
"""Dictionaries within each other; no project nests them as deep, and one that holds itself never ends."""


@dataclass(frozen=True)
class StateFile:
    """What a file of weights holds.

    Attributes:
        path: of the file itself, also where its folder was named.
        tensors: by name; those of nested dictionaries by their joined names, such as `state_dict.module.fc.bias`. They
            are mapped from the disk where the format allows it, and not to be written to.
        metadata: of safetensors, and of a `config.json` beside it under `pretrained_cfg` as JSON.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_state(path: str | Path) -> StateFile:
    """Read a file of weights, or a folder in the layout of Hugging Face.

    Raises:
        InputError: not there, not a file of weights, torn, or with objects that are not tensors.
    """
    path = _file_at(Path(path).expanduser())
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MOST_HEADER_BYTES:
        tensors, metadata = _safetensors(path)
    elif start.startswith(_ZIP) or start[:1] == b"\x80":
        tensors, metadata = dict(_flat(path, _torch_load(path, mmap=start.startswith(_ZIP)))), {}
    else:
        what = "neither safetensors nor a file of torch.save; convert it to one of them" if start else "an empty file"
        raise InputError(f"{path}: {what}")
    if not tensors:
        raise InputError(f"{path}: holds no tensors")
    return StateFile(path, tensors, metadata | _beside(path))


def _file_at(path: Path) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path}: no such file")
        return path
    if (path / "checkpoints").is_dir() or (path / "progress.json").is_file():
        raise InputError(f"{path}: a run of this project; start from it with init_from={path} instead")
    for name in _WEIGHTS_IN_FOLDER:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: a folder without {' or '.join(_WEIGHTS_IN_FOLDER)}; pass a file of weights")


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not whole ({' '.join(str(error).split())}); fetch it again") from error


def _torch_load(path: Path, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if found is None:
            raise InputError(f"{path}: not a whole file of torch.save; fetch it again") from error
        raise InputError(
            f"{path}: holds a {found[1]} besides tensors, which is not loaded, since it could run code; where you "
            f"trust the file, save its tensors alone: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW_FILE)"
        ) from error
    except Exception as error:  # torn pickles end in errors of every kind
        if "TorchScript" in str(error):
            raise InputError(
                f"{path}: a TorchScript program, not a file of weights; save the state_dict() of what it was made from"
            ) from error
        words = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: not a whole file of torch.save ({words}); fetch it again") from error


def _flat(path: Path, value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries by their joined names.

    Raises:
        InputError: they are nested too deep.
    """
    if isinstance(value, Tensor):
        yield prefix, value.detach()
    elif isinstance(value, Mapping):
        if depth == _DEEPEST:
            raise InputError(
                f"{path}: holds dictionaries more than {_DEEPEST} deep, or one that holds itself; save its tensors "
                f"alone: torch.save(torch.load(FILE)[KEY], NEW_FILE)"
            )
        for key, item in value.items():
            yield from _flat(path, item, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def _beside(path: Path) -> dict[str, str]:
    """What a Hugging Face folder says of the input."""
    try:
        found = json.loads((path.parent / "config.json").read_text())["pretrained_cfg"]
        return {"pretrained_cfg": json.dumps(found)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
