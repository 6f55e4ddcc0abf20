"""Matrices whose rows have length 1."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize


@torch.no_grad()
def normalize_rows_(matrices: Iterable[Tensor]) -> None:
    """Scale every row to length 1, in place.

    Collectives: none; under FSDP2 the rows of a matrix are whole on their rank.
    """
    for matrix in matrices:
        rows = matrix.to_local() if isinstance(matrix, DTensor) else matrix
        rows.copy_(normalize(rows, dim=1))
