"""Loading: every rank reads its own pieces, however many ranks and whichever strategy wrote the checkpoint.

A tensor is stored under its canonical name with its place in the whole, so any sharding can read what another has
written. How a checkpoint lies on disk: `checkpoint/folder.py`; how it gets there: `checkpoint/saver.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from largescale.checkpoint.folder import Checkpoint, folder_of, named_steps, open_checkpoint
from largescale.processes import rank, world_size
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)


class CheckpointGone(InputError):
    """A checkpoint was removed while it was read: a run that goes on keeps the newest ones."""


def agree_on_latest(folder: Path, device: torch.device) -> Checkpoint | None:
    """The newest checkpoint whose files are intact, the same one on all ranks; None for a new run.

    Raises:
        InputError: there are checkpoints, but all of them are damaged.

    Collectives: those of `newest_whole`.
    """
    checkpoint, complaint = newest_whole(folder, device)
    if complaint and checkpoint is None:
        raise InputError(f"{complaint}: no whole checkpoint is left; restore one, or remove {folder} to start over")
    return checkpoint


def newest_whole(folder: Path, device: torch.device) -> tuple[Checkpoint | None, str]:
    """The newest checkpoint whose files are intact, the same one on all ranks, and what is wrong with the last one that
    was found damaged before it.

    The ranks share the work of comparing checksums. A damaged checkpoint is named in a warning and skipped.

    Collectives: every rank must call it; one broadcast, and one all-reduce per checkpoint that is checked.
    """
    # By their names: a checkpoint with an unreadable mark is damaged, but this is not a new run.
    steps: list[list[int]] = [named_steps(folder)]
    dist.broadcast_object_list(steps, src=0, device=device)
    complaint = ""
    for step in steps[0]:
        path = folder_of(folder, step)
        checkpoint = open_checkpoint(path)
        damage = "progress.json cannot be read"
        if checkpoint is not None:
            other = "" if checkpoint.step == step else f"progress.json is of step {checkpoint.step}"
            damage = other or checkpoint.damage(rank(), world_size())
        if damage:
            found = f"{path}: {damage}"
            _log.warning("damaged checkpoint, falling back to the one before. %s", found, extra={"all_ranks": True})
        damaged = torch.tensor(float(bool(damage)), device=device)
        dist.all_reduce(damaged)
        if not damaged:
            return checkpoint, complaint
        complaint = f"{path}: {damage}" if damage else str(path)
    return None, complaint


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint, by canonical name.

    Raises:
        CheckpointGone: it was removed meanwhile.
        InputError: a file is not safetensors.
    """
    with _reader(checkpoint) as reader:
        return {name: tuple(meta.size) for name, meta in reader.stored().items()}


def in_pieces(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Zeros on the host like all tensors of a checkpoint, to load it into, cut along their first axis over all ranks.

    Raises:
        CheckpointGone: it was removed meanwhile.
        InputError: a file is not safetensors.

    Collectives: every rank must call it; it makes a mesh.
    """
    mesh = init_device_mesh("cpu", (world_size(),))
    state: dict[str, Tensor] = {}
    with _reader(checkpoint) as reader:
        stored = reader.stored()
    for name, meta in stored.items():
        shape, dtype = tuple(meta.size), meta.properties.dtype
        if shape:
            state[name] = zeros(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        else:  # a number cannot be cut
            state[name] = torch.zeros((), dtype=dtype)
    return state


class _Reader(HuggingFaceStorageReader):
    """Reads the headers of a checkpoint's files once, though both `load` and torch want them."""

    def read_metadata(self) -> Metadata:
        return self._headers

    @cached_property
    def _headers(self) -> Metadata:
        try:
            return super().read_metadata()
        except SafetensorError as error:
            raise InputError(f"{self.path}: a file there is not safetensors ({error}); remove it") from error

    def stored(self) -> dict[str, TensorStorageMetadata]:
        """What is stored of each tensor, by canonical name."""
        all_of_it = self._headers.state_dict_metadata
        return {name: meta for name, meta in all_of_it.items() if isinstance(meta, TensorStorageMetadata)}


@contextmanager
def _reader(checkpoint: Checkpoint) -> Iterator[_Reader]:
    """A reader of a checkpoint that a run, its own or another one, may remove meanwhile."""
    try:
        yield _Reader(str(checkpoint.path))
    except Exception as error:
        if checkpoint.path.exists():
            raise
        raise CheckpointGone(
            f"{checkpoint.path}: removed while being read, since its run goes on; run the command again, or raise "
            f"checkpoint.keep there"
        ) from error


def load(checkpoint: Checkpoint, state: dict[str, Tensor], *, no_dist: bool = False) -> None:
    """Fill the tensors of `state` from a checkpoint, in place, whatever sharding it was saved with.

    Args:
        state: tensors by canonical name; names may be a part of those in the checkpoint.
        no_dist: load in this process alone.

    Raises:
        CheckpointGone: it was removed meanwhile.
        InputError: a tensor is missing or has another shape; names it.

    Collectives: every rank must call it, unless no_dist.
    """
    with _reader(checkpoint) as reader:
        _load(checkpoint, state, reader, no_dist=no_dist)


def _load(checkpoint: Checkpoint, state: dict[str, Tensor], reader: _Reader, *, no_dist: bool) -> None:
    stored = {name: tuple(meta.size) for name, meta in reader.stored().items()}
    for name, tensor in state.items():
        if stored.get(name) != tuple(tensor.shape):
            raise InputError(
                f"{checkpoint.path}: {name} is {stored.get(name, 'missing')} there and {tuple(tensor.shape)} in this "
                f"configuration; use the configuration it was saved with, or another run.dir"
            )
    with warnings.catch_warnings():
        # torch remarks on what no_dist asks for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            dcp.load(state, storage_reader=reader, no_dist=no_dist)
        except CheckpointException as error:  # a BaseException, which `except Exception` would miss
            raise next(iter(error.failures.values()))[0] from error
