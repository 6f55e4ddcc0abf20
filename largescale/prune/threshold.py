"""The smallest weights of a whole network, exactly, where ranks hold pieces of it and nobody gathers them.

As one process would find them::

    order = sorted((|w|, name, place) for each weight that is left)
    pruned = order[:num]

Numbers that are not negative sort like the integers with their bits. So the largest number to prune is found digit by
digit, of 16 bits each: ranks count how often each value of a digit comes, among numbers that begin with the digits
found so far, and one all-reduce adds up the counts. What is equal to that number is pruned by name and place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.distributed.collectives import exchanging
from largescale.processes import rank, world_size

_DIGIT_BITS = 16


def magnitudes(weights: Tensor) -> Tensor:
    """Integers of the same shape that sort as the absolute values do. What is not a number sorts last."""
    return weights.abs().view(torch.int64 if weights.dtype == torch.float64 else torch.int32)


def prune_smallest(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], num: int) -> dict[str, Tensor]:
    """What is kept once the `num` smallest of the weights that were kept so far are not.

    Args:
        scores: by name, this rank's pieces, flat: integers of at least 0, of one type. Pieces of a parameter follow
            each other as ranks do, and may be empty.
        kept: bool pieces of the same shapes: what is left so far.
        num: of weights of all ranks together; at most as many as are left.

    Returns:
        New pieces like `kept`.

    Collectives: every rank must call it; an all-reduce of 65,536 counts for each 16 bits of a score, and one of a
    count per parameter and rank.
    """
    if num == 0:
        return {name: piece.clone() for name, piece in kept.items()}
    names = sorted(scores)
    largest = _nth_smallest([scores[name][kept[name]] for name in names], num)
    found = {name: kept[name] & (scores[name] > largest.value) for name in names}
    equal = {name: (kept[name] & (scores[name] == largest.value)).nonzero().flatten() for name in names}
    for name, quota in zip(names, _shared_out([len(equal[name]) for name in names], largest.equal), strict=True):
        found[name][equal[name][quota:]] = True
    return found


class _Largest(NamedTuple):
    """The largest number to prune, and how many of those equal to it."""

    value: int
    equal: int


def _nth_smallest(pieces: list[Tensor], num: int) -> _Largest:
    """The number at place `num`, counted from 1, of all ranks' pieces in order."""
    bits = torch.iinfo(pieces[0].dtype).bits
    value, left = 0, num
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(2**_DIGIT_BITS, dtype=torch.int64, device=pieces[0].device)
        for piece in pieces:
            begins = piece if shift + _DIGIT_BITS == bits else piece[(piece >> (shift + _DIGIT_BITS)) == value]
            digits = (begins >> shift) & (2**_DIGIT_BITS - 1)
            counts += torch.bincount(digits.long(), minlength=2**_DIGIT_BITS)
        _sum_over_ranks(counts)
        up_to = counts.cumsum(0)
        digit = int((up_to < left).sum())
        left -= int(up_to[digit] - counts[digit])
        value = value << _DIGIT_BITS | digit
    return _Largest(value, left)


def _shared_out(own: list[int], quota: int) -> list[int]:
    """How many of a quota fall to each of this rank's pieces, which hold `own` candidates each: first come by
    parameter, then by rank.
    """
    counts = torch.zeros(len(own), world_size(), dtype=torch.int64)
    counts[:, rank()] = torch.tensor(own)
    _sum_over_ranks(counts)
    before = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)[:, rank()]
    return [max(0, min(count, quota - int(earlier))) for count, earlier in zip(own, before, strict=True)]


def _sum_over_ranks(counts: Tensor) -> None:
    if dist.is_initialized():
        with exchanging("counts of weights"):
            dist.all_reduce(counts)
