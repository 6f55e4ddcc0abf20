"""Checkpoints: every rank writes its own pieces as safetensors, published by one rename.

    checkpoints/
      step-00001000/
        shard-00001-model-00001-of-00001.safetensors    one file a rank (torch.distributed.checkpoint)
        ...
        progress.json                                   step, sizes of all files; written last, makes it whole
      step-00002000/
      latest                                            names the newest whole one

A folder is written under a temporary name, made durable and then renamed, so whatever has a final name is whole. A
tensor is stored under its canonical name with its place in the whole, so any number of ranks and any strategy can
load it. Nothing in a checkpoint is executed or unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from largescale.processes import barrier, rank
from shards.errors import InputError
from shards.files import atomic_write, sync_folder

PROGRESS = "progress.json"
LATEST = "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that were complete when it was saved: the first step to do."""
        return int(self.progress["step"])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in it, by canonical name."""
        stored = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        return {name: tuple(meta.size) for name, meta in stored.items() if isinstance(meta, TensorStorageMetadata)}


def save(folder: Path, state: dict[str, Tensor], progress: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, publish it, and remove all but the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder.
        state: tensors by canonical name; DTensors are written by the ranks that hold them, others once.
        progress: JSON values, with `step`: how many steps are done.
        keep: whole checkpoints to keep, this one included.

    Collectives: every rank must call it; torch.distributed.checkpoint's planning and three barriers.
    """
    final = folder / f"step-{progress['step']:08d}"
    temporary = folder / f".{final.name}.writing"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    barrier()
    if rank() == 0:
        _publish(temporary, final, progress)
        _remove_old(folder, keep)
    barrier()
    return final


def find_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None where there is none.

    `latest` is a convenience for people and scripts: what counts is which folders are whole.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        checkpoint = _open_whole(path)
        if checkpoint is not None:
            return checkpoint
    return None


def load(checkpoint: Checkpoint, state: dict[str, Tensor], *, no_dist: bool = False) -> None:
    """Fill the tensors of `state` from a checkpoint, in place, whatever sharding it was saved with.

    Args:
        state: tensors by canonical name; names may be a part of those in the checkpoint.
        no_dist: load in this process alone.

    Raises:
        InputError: a tensor is missing or has another shape; names it.

    Collectives: every rank must call it, unless no_dist.
    """
    shapes = checkpoint.shapes()
    for name, tensor in state.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise InputError(
                f"{checkpoint.path}: {name} is {shapes.get(name, 'missing')} there and {tuple(tensor.shape)} in this "
                f"configuration; use the configuration it was saved with, or another run.dir"
            )
    with warnings.catch_warnings():
        # torch remarks on what no_dist asks for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint.path)), no_dist=no_dist)


def _publish(temporary: Path, final: Path, progress: dict[str, Any]) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    for name in sizes:
        with (temporary / name).open("rb") as file:
            os.fsync(file.fileno())
    with atomic_write(temporary / PROGRESS) as file:
        file.write(json.dumps({**progress, "files": sizes}, indent=1).encode())
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync_folder(final.parent)
    with atomic_write(final.parent / LATEST) as file:
        file.write(f"{final.name}\n".encode())


def _open_whole(path: Path) -> Checkpoint | None:
    try:
        progress = json.loads((path / PROGRESS).read_text())
        sizes_agree = all((path / name).stat().st_size == size for name, size in progress["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return Checkpoint(path, progress) if sizes_agree else None


def _remove_old(folder: Path, keep: int) -> None:
    whole = [path for path in sorted(folder.glob("step-*")) if _open_whole(path) is not None]
    for path in whole[:-keep]:
        # Renamed first: a removal that is interrupted must not leave half a checkpoint under a final name.
        doomed = folder / f".{path.name}.removing"
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    for leftover in folder.glob(".step-*.removing"):
        shutil.rmtree(leftover, ignore_errors=True)
