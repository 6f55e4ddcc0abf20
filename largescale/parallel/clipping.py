"""Gradients clipped tensor by tensor, exact where tensors are cut over ranks.

As the published code of DINO (arXiv 2104.14294) does::

    for g in gradients:                                         # each of a whole parameter
        g *= min(1, limit / (|g| + 1e-6))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.distributed.collectives import exchanging
from largescale.optim.lars import norms

_EPS = 1e-6


class GradientPieces(NamedTuple):
    """What a rank holds of the gradients of whole parameters.

    Attributes:
        numbers: of the parameter that each piece belongs to, counted alike on all ranks of the group.
        tensors: the pieces.
        parameters: how many there are.
        group: the ranks that hold the pieces of a parameter; None where parameters are whole.
    """

    numbers: list[int]
    tensors: list[Tensor]
    parameters: int
    group: dist.ProcessGroup | None


@torch.no_grad()
def clip_each(pieces: GradientPieces, limit: float, device: torch.device) -> None:
    """Scale gradients in place so that none is longer than `limit`.

    Args:
        pieces: of all gradients.
        limit: of a norm.
        device: of this rank, which may hold no piece.

    Collectives: one all-reduce of a number per parameter; none where parameters are whole.
    """
    squares = torch.zeros(pieces.parameters, dtype=torch.float64, device=device)
    if pieces.tensors:
        places = torch.tensor(pieces.numbers).to(device, non_blocking=True)  # the host need not wait for the device
        squares.index_add_(0, places, norms(pieces.tensors).double().square().to(device))
    if pieces.group is not None:
        with exchanging("norms of gradients"):
            dist.all_reduce(squares, group=pieces.group)
    factors = (limit / (squares.sqrt() + _EPS)).clamp_max(1)
    if pieces.tensors:
        scales = [factors[number].to(piece) for number, piece in zip(pieces.numbers, pieces.tensors, strict=True)]
        torch._foreach_mul_(pieces.tensors, scales)
