"""Whole tensors in memory into those of a training, whichever way a strategy has cut these."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future


def fill(state: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy whole tensors into those of a state, in place; each rank reads only its own pieces of them.

    Args:
        state: tensors or DTensors by name.
        tensors: the whole ones by the same names, the same on all ranks.

    Collectives: every rank must call it; those of planning a load.
    """
    try:
        dcp.load(state, storage_reader=_Memory(tensors))
    except CheckpointException as error:  # a BaseException, which `except Exception` would miss
        raise next(iter(error.failures.values()))[0] from error


class _Memory(StorageReader):
    """A storage whose content is in this process already."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There is none."""
        return False

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes of the tensors, each in one piece."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype),
                    tensor.shape,
                    [ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)],
                )
                for name, tensor in self._tensors.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what a rank has asked for."""
        for item in plan.items:
            source = self._tensors[item.storage_index.fqn]
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
