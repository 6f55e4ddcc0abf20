"""Exchanges between ranks that several parts of the package use, and their names for a plan.

Every function takes equally large pieces from all ranks of a group, and every rank of the group must call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renames these collectives; earlier versions have the old names alone.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

_named: ContextVar[str] = ContextVar("_named", default="")
"""What this thread is exchanging within `exchanging`."""


@contextmanager
def exchanging(what: str) -> Iterator[None]:
    """Name what the collectives within exchange, so that a plan can list them (`largescale.plan.trace`)."""
    outer = _named.set(what)
    try:
        yield
    finally:
        _named.reset(outer)


def exchanged(otherwise: str) -> str:
    """What is being exchanged, or `otherwise` outside `exchanging`."""
    return _named.get() or otherwise


def sum_over_ranks(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum several tensors over all ranks, in one message.

    Args:
        parts: by name, the same names and shapes on every rank; any type of numbers.

    Returns:
        Their sums, float64 on the host. The host waits for the device once.

    Collectives: every rank must call it; one all-reduce, with one float64 number per element of the parts.
    """
    message = torch.cat([part.flatten().double() for part in parts.values()])
    dist.all_reduce(message)
    sums = message.cpu().split([part.numel() for part in parts.values()])
    return {name: total.view(part.shape) for (name, part), total in zip(parts.items(), sums, strict=True)}


def all_gather(whole: Tensor, piece: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fill a contiguous tensor with all ranks' pieces, in the order of the ranks. Collectives: one all-gather."""
    getattr(dist, _ALL_GATHER)(whole, piece, group=group)


def reduce_scatter(piece: Tensor, whole: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fill `piece` with this rank's piece of the sum of all ranks' tensors. Collectives: one reduce-scatter."""
    getattr(dist, _REDUCE_SCATTER)(piece, whole, group=group)


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' rows [B, ...] as [ranks * B, ...], in the order of the ranks, with the exact gradient.

    The gradient of a rank's rows is the sum of what all ranks' losses say of them. With a loss that is the mean over
    this rank's own rows, and gradients that are averaged over ranks as every strategy does, a step is that of one
    process with all rows.

    Collectives: one all-gather forward, one reduce-scatter backward, of all rows; none in a group of one.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.shape = group, rows.shape
        whole = rows.new_empty(dist.get_world_size(group) * len(rows), *rows.shape[1:])
        with exchanging("rows of the batch"):
            all_gather(whole, rows.contiguous(), group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        piece = gradient.new_empty(ctx.shape)
        with exchanging("rows of the batch"):
            reduce_scatter(piece, gradient.contiguous(), ctx.group)
        return piece, None


def rows_on_rank_0(rows: Tensor) -> Tensor | None:
    """Rows [N, ...] of all ranks in the order of ranks, on rank 0's host; None on the others. Ranks may have different
    numbers of rows, and those without any need not know how wide they are.

    Collectives: every rank must call it; one all-gather of shapes, then one message per rank and piece.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    rows = rows.cpu().contiguous()
    shapes: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(shapes, tuple(rows.shape))
    if dist.get_rank() > 0:
        for piece in rows.flatten().split(_PIECE):
            dist.send(piece, dst=0)
        return None
    shape = next((shape for shape in shapes if shape[0]), shapes[0])
    gathered = rows.new_empty(sum(one[0] for one in shapes), *shape[1:])
    for source, part in enumerate(gathered.split([one[0] for one in shapes])):
        if source == 0:
            part.copy_(rows.view_as(part))
            continue
        for piece in part.view(-1).split(_PIECE):
            dist.recv(piece, src=source)
    return gathered


def tensor_from_rank_0(tensor: Tensor | None) -> Tensor:
    """A tensor that rank 0 passes, on every rank's host; what others pass does not count.

    Collectives: every rank must call it; one broadcast of its shape, then one per piece.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        assert tensor is not None
        return tensor
    shapes = [None if tensor is None else (tuple(tensor.shape), tensor.dtype)]
    dist.broadcast_object_list(shapes, src=0)
    assert shapes[0] is not None
    shape, dtype = shapes[0]
    own = tensor if dist.get_rank() == 0 else None
    whole = torch.empty(shape, dtype=dtype) if own is None else own.cpu().contiguous()
    for piece in whole.view(-1).split(_PIECE):
        dist.broadcast(piece, src=0)
    return whole


_PIECE = 2**24
"""Numbers sent in one message; gloo is not made for messages of gigabytes."""
