"""State that all ranks hold alike, as a part of `Method.state`."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


def replicated(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that is the same on all ranks of a mesh, as a DTensor that shares its memory. Collectives: none."""
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False)
