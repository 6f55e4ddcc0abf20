"""Sums over all ranks' rows that are the same bits in any order, on any number of ranks.

Floating-point sums depend on their order: on how rows lie on ranks, and on a GPU on which atomic addition comes first.
Here values are rounded to multiples of a power of two and added as int64, which is exact. Of N values of at most L, a
rounding changes each by at most L N / 2^62, which is less than float32 holds up to a billion rows.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.distributed.collectives import all_gather
from largescale.processes import world_size

_BITS = 62
_ROWS = 4096
"""That are added together."""


class NotFinite(ValueError):
    """Numbers are not finite: what made them has diverged."""


class FixedPoint:
    """Adds rows of numbers by group.

    Attributes:
        num_rows: of each rank.
        alone: whether it is about this rank's rows only.
        ranks: that add up.
    """

    def __init__(self, values: Tensor, *, alone: bool = False) -> None:
        """Agree on a unit for the values [n, D] that this rank has; ranks may have different numbers of rows.

        Args:
            values: of this rank.
            alone: whether these are all rows, whatever other ranks have.

        Raises:
            NotFinite: on all ranks, if values are not finite.

        Collectives: every rank must call it, but for `alone`; one all-gather of two numbers.
        """
        self.alone, self.ranks = alone, 1 if alone else world_size()
        ends = torch.stack(torch.aminmax(values)) if values.numel() else values.new_zeros(2)  # no copy of the values
        largest = ends.abs().max().double()
        own = torch.stack([largest, torch.full_like(largest, len(values))])
        gathered = own.new_empty(self.ranks, 2)
        if self.ranks > 1:
            all_gather(gathered.view(-1), own)
        else:
            gathered[0] = own
        self.num_rows = [int(number) for number in gathered[:, 1].tolist()]
        found = float(gathered[:, 0].max())
        if not math.isfinite(found):
            raise NotFinite("values are not finite")
        bits = _BITS - max(1, self.total).bit_length()
        self._unit = math.ldexp(1.0, math.frexp(found)[1] - bits) if found else 1.0

    @property
    def total(self) -> int:
        """Rows of all ranks."""
        return sum(self.num_rows)

    def add(self, sums: Tensor, groups: Tensor, values: Tensor) -> None:
        """Add rows [n, D] to the sums of their groups, int64 [K, D], in place."""
        sums.index_add_(0, groups, (values.double() / self._unit).round_().long())

    def value(self, sums: Tensor) -> Tensor:
        """Sums in float64."""
        return sums.double() * self._unit


def mean_of_rows(values: Tensor) -> Tensor:
    """Mean of all ranks' rows [n, D], the same bits on any number of ranks: float64 [D]; 0 of none.

    Raises:
        NotFinite: on all ranks, if values are not finite.

    Collectives: every rank must call it; one all-gather of two numbers, one all-reduce of D.
    """
    exact = FixedPoint(values)
    sums = torch.zeros(1, values.shape[1], dtype=torch.int64, device=values.device)
    for block in values.split(_ROWS):
        exact.add(sums, torch.zeros(len(block), dtype=torch.int64, device=values.device), block)
    if exact.ranks > 1:
        dist.all_reduce(sums)
    return exact.value(sums)[0] / max(1, exact.total)


def sums_by_group(values: Tensor, groups: Tensor, num_groups: int, *, alone: bool = False) -> Tensor:
    """Sums of all ranks' numbers [n], or of this one's `alone`, by group, int64 [n]: float64 [num_groups].

    Collectives: every rank must call it, but for `alone`; one all-gather of two numbers, one all-reduce of the sums.
    """
    exact = FixedPoint(values[:, None], alone=alone)
    sums = torch.zeros(num_groups, 1, dtype=torch.int64, device=values.device)
    exact.add(sums, groups, values[:, None])
    if exact.ranks > 1:
        dist.all_reduce(sums)
    return exact.value(sums)[:, 0]
