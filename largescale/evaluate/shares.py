"""What each of several ranks does of a measurement, and how their counts become one figure.

Every rank has all features (the files are mapped into memory, which ranks of a node share) and works on every
`world_size`-th row. Counts are whole numbers, so a figure is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from largescale.distributed.collectives import sum_over_ranks
from largescale.processes import rank, world_size

Value = TypeVar("Value")


def own_rows(num_rows: int) -> Tensor:
    """Rows of this rank, int64; none where there are fewer rows than ranks."""
    return torch.arange(min(rank(), num_rows), num_rows, world_size())


def total(part: Tensor) -> Tensor:
    """The sum of all ranks' tensors, float64 on the host. Collectives: one all-reduce if there are several ranks."""
    return sum_over_ranks({"part": part})["part"] if world_size() > 1 else part.double().cpu()


def from_all_ranks(own: dict[str, Value]) -> dict[str, Value]:
    """What all ranks have found, of different names. Collectives: one all-gather of objects if there are several."""
    parts: list[dict[str, Value]] = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, Any]:
    """McNemar's exact test of two classifiers on the same images, from the images that only one of them gets right.

    Args:
        first, second: which images each gets right.

    Returns:
        `only_first` and `only_second`, numbers of such images, and `p`: how likely chance splits them as unevenly.
    """
    from scipy.stats import binomtest  # see `protocols`

    one, other = (torch.tensor(hits, dtype=torch.bool) for hits in (first, second))
    ours, theirs = int((one & ~other).sum()), int((other & ~one).sum())
    p = float(binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0
    return {"only_first": ours, "only_second": theirs, "p": p}


def interval(share: float, num: int) -> list[float]:
    """The 95 % confidence interval (Wilson) of a share that was found on `num` independent test images."""
    from scipy.stats import binomtest  # see `protocols`

    found = binomtest(round(share * num), num).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]
