"""State by sample id: a row of numbers per image of the corpus, such as a memory bank or pseudo-labels.

Rank r of W holds the r-th range of ids, `ceil(N / W)` of them, as DTensor's `Shard(0)` cuts a tensor; so memory shrinks
with W and a checkpoint loads into any number of ranks.

A step reads and writes the rows of its batch by exchanges of a fixed size: every rank knows all ids of the batch and
fills in the rows it holds, and one all-reduce adds up rows that are zero on all ranks but one, which is exact. An
all-to-all of ids and rows would send less, but how much goes to whom depends on the ids: the host would have to wait
for the device in every step. Of a memory bank most of what is read are negatives, which all ranks need anyway.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import normalize

from largescale.data.device_random import uniform
from largescale.distributed.collectives import exchanging
from largescale.methods.phase import own_ids
from largescale.processes import world_size
from shards.ground.errors import InputError

_BLOCK = 4096
"""Ids whose first rows are drawn together."""


def too_many_rows(num_samples: int, width: int, element_size: int = 4, *, key: str, max_gb: float) -> str:
    """A line if a rank's part of rows of all samples is larger than a limit; else empty.

    Args:
        num_samples, width: of the rows, [N, width].
        element_size: of a number, in bytes.
        key: the setting with the limit.
        max_gb: the limit, in GB (10^9 bytes).
    """
    ranks = world_size()
    size = -(-num_samples // ranks) * width * element_size / 1e9
    return (
        ""
        if size <= max_gb
        else (
            f"{key}={max_gb:g}: rows of {width} numbers for {num_samples:,} images take {size:.3g} GB on each "
            f"of {ranks} rank{'s' * (ranks > 1)}; use more ranks or shorter rows, or raise it"
        )
    )


def last_of_each(ids: Tensor) -> Tensor:
    """Which of some ids come no more after their place: bool [M]. Collectives: none."""
    in_order, order = ids.sort(stable=True)
    last = torch.ones_like(in_order, dtype=torch.bool)
    last[:-1] = in_order[1:] != in_order[:-1]
    return torch.empty_like(last).index_copy_(0, order, last)


class RowsById(nn.Module):
    """Rows [N, width] of all samples, of which this rank holds `rows[:-1]`; the last one takes what is for nobody here.

    Args:
        width: of a row.
        dtype: of the rows; those of floats follow the module's precision.

    Attributes:
        first: the first id whose row this rank holds.
        num_own: how many it holds.
    """

    rows: Tensor

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.width, self.num_samples, self.first, self.num_own = width, 0, 0, 0
        self.register_buffer("rows", torch.zeros(1, width, dtype=dtype), persistent=False)

    def make_room(self, num_samples: int, *, key: str, max_gb: float) -> None:
        """Take memory for this rank's part of the rows of samples 0 to `num_samples` - 1, all zero.

        Args:
            key: the setting with the limit.
            max_gb: limit of a rank's part, in GB (10^9 bytes).

        Raises:
            InputError: a rank's part is larger.
        """
        if line := too_many_rows(num_samples, self.width, self.rows.element_size(), key=key, max_gb=max_gb):
            raise InputError(line)
        own = own_ids(num_samples)
        self.num_samples, self.first, self.num_own = num_samples, own.start, len(own)
        self.rows = self.rows.new_zeros(self.num_own + 1, self.width)

    @torch.no_grad()
    def draw_unit_rows(self, seed: int) -> None:
        """Fill the rows with random unit vectors: each a function of the seed and its id."""
        for start in range(self.first // _BLOCK * _BLOCK, self.first + self.num_own, _BLOCK):
            # Whole blocks: kernels may round differently at the ends of a tensor.
            ids = torch.arange(start, start + _BLOCK, device=self.rows.device)
            drawn = normalize(2 * uniform(seed, ids, num=self.width, device=ids.device) - 1, dim=1)
            first, end = max(start, self.first), min(start + _BLOCK, self.first + self.num_own)
            self.rows[first - self.first : end - self.first] = drawn[first - start : end - start].to(self.rows.dtype)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Rows of some samples, which need not differ: [M, width].

        Args:
            ids: int64 [M], the same on all ranks.

        Collectives: one all-reduce of the rows; none for a single rank.
        """
        places = self._places(ids)
        found = torch.where((places < self.num_own)[:, None], self.rows.index_select(0, places), 0)
        if world_size() > 1:
            with exchanging("rows by sample id"):
                dist.all_reduce(found)
        return found

    @torch.no_grad()
    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Replace rows; of a sample that comes several times the last one stays. Collectives: none.

        Args:
            ids: int64 [M], the same on all ranks and in the same order.
            rows: [M, width], likewise.
        """
        places = torch.where(last_of_each(ids), self._places(ids), self.num_own)
        self.rows.index_copy_(0, places, rows.to(self.rows.dtype))

    @property
    def own(self) -> Tensor:
        """The rows that this rank holds, to be changed in place."""
        return self.rows[: self.num_own]

    def tensor(self, mesh: DeviceMesh) -> DTensor:
        """All rows, for a checkpoint."""
        return DTensor.from_local(
            self.own,
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((self.num_samples, self.width)),
            stride=(self.width, 1),
        )

    def _places(self, ids: Tensor) -> Tensor:
        """Where this rank holds the rows of ids; the last row where it does not."""
        places = ids - self.first
        return torch.where((places >= 0) & (places < self.num_own), places, self.num_own)
