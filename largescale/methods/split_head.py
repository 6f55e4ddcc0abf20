"""A linear layer whose classes come in groups, each with a softmax of its own, and whose rows are split over ranks.

For each sample the caller names some of the groups, and the sample's class in each. With rows W of such a group g and
class c::

    loss = -log softmax(W[g] x + b[g])[c]

Every rank gathers the features of all ranks, and computes their products with the rows that it holds; what softmax
needs of the others are four numbers per sample and group that is asked. So a layer of millions of classes costs each
rank its part of the memory and of the products, and no gradient of a row is exchanged, where a strategy that shards
parameters would gather all rows for each step. Products are those with all rows of a rank, also of groups that are not
asked of a sample: which ones are is known to the device alone, and the host does not wait for it. So a step holds
several matrices of [samples of all ranks, rows of this rank].

The layer is state, not a parameter: it is drawn again now and then, and trained by an SGD of its own without momentum,
so that no optimizer holds anything of a former one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from largescale.distributed.collectives import exchanging, gather_rows
from largescale.methods.feature_clusters import drawn_head
from largescale.methods.rows_by_id import RowsById
from largescale.processes import rank, world_size

_ROWS = 1024
"""That are drawn together."""


class Asked(NamedTuple):
    """A group for each sample of all ranks, and the sample's class there.

    Attributes:
        groups, classes: int64 [N].
    """

    groups: Tensor
    classes: Tensor


class Answers(NamedTuple):
    """What a layer says of this rank's samples.

    Attributes:
        loss: the mean over them of weighted losses, a sum over what was asked; with the gradient of their features.
        losses: such means of each thing that was asked, detached, [Q].
        right: shares of the samples with a weight whose largest logit is that of the right class alone, detached, [Q];
            their means over ranks are the shares of all.
    """

    loss: Tensor
    losses: Tensor
    right: Tensor


class SplitHead(nn.Module):
    """The layer.

    Args:
        width: of the features, F.
        groups: numbers of classes of each.
        micro_batches: in a step.
    """

    group_of_row: Tensor
    starts: Tensor

    def __init__(self, width: int, groups: Sequence[int], micro_batches: int) -> None:
        super().__init__()
        self._width, self._groups, self._micro_batches = width, list(groups), micro_batches
        # W and b side by side, [classes of all groups, F + 1], of which this rank holds some.
        self._rows = RowsById(width + 1)
        # The group of each of this rank's rows, then -1 for the spare row; the first row of each group.
        self.register_buffer("group_of_row", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("starts", torch.zeros(0, dtype=torch.int64), persistent=False)
        self._gradient: Tensor | None = None
        self._num_seen = 0

    def make_room(self) -> None:
        """Take memory for the rows of this rank, all zero."""
        self._rows.make_room(sum(self._groups), key="", max_gb=math.inf)
        ends = torch.tensor(self._groups, device=self.starts.device).cumsum(0)
        own = torch.arange(self._rows.num_own, device=ends.device) + self._rows.first
        self.group_of_row = torch.cat([torch.searchsorted(ends, own, right=True), own.new_full((1,), -1)])
        self.starts = torch.cat([ends.new_zeros(1), ends[:-1]])

    @torch.no_grad()
    def draw(self, seed: int, step: int) -> None:
        """Draw the rows again, from (seed, step, row)."""
        first, end = self._rows.first, self._rows.first + self._rows.num_own
        for start in range(first // _ROWS * _ROWS, end, _ROWS):
            # Whole blocks: kernels may round differently at the ends of a tensor.
            rows = torch.arange(start, start + _ROWS, device=self.group_of_row.device)
            drawn = drawn_head(rows, self._width, seed=seed, step=step)
            low, high = max(start, first), min(start + _ROWS, end)
            self._rows.own[low - first : high - first] = drawn[low - start : high - start].to(self._rows.rows.dtype)
        self._gradient, self._num_seen = None, 0

    def forward(self, features: Tensor, weights: Tensor, asked: Sequence[Asked]) -> Answers:
        """What the layer says of features, and notes of its own gradient.

        Args:
            features: of this rank's samples, [n, F], in float32 or float64.
            weights: of the losses of the samples of all ranks, [N], rank after rank.
            asked: Q groups of each.

        Collectives: an all-gather of features, which is a reduce-scatter in the backward pass, and two all-reduces of Q
            and 3 Q numbers per sample.
        """
        num, own = len(features), self._rows.rows.to(features.dtype)
        x = gather_rows(features)
        logits = torch.addmm(own[:, -1], x, own[:, :-1].T)
        with torch.no_grad():
            in_groups = [one.groups[:, None] == self.group_of_row for one in asked]
            largest, log_sums, right, num_largest = self._over_ranks(logits, in_groups, asked)
            mine = slice(rank() * num, (rank() + 1) * num)
            losses = ((log_sums - right) * weights)[:, mine].mean(1)
            wrong = torch.zeros_like(logits)
            for number, (one, inside) in enumerate(zip(asked, in_groups, strict=True)):
                wrong += torch.where(inside, (logits - log_sums[number, :, None]).exp(), 0)
                wrong -= self._is_right(one).to(wrong.dtype)
            wrong *= weights[:, None] / num
            self._add_gradient(wrong, x)
        # Its value is that of the losses, its gradient what this rank's rows say of all samples.
        loss = (wrong * logits).sum()
        picked = (right >= largest) & (num_largest == 1) & (weights > 0)
        shares = picked[:, mine].sum(1) * world_size() / (weights > 0).sum().clamp_min(1)
        return Answers(loss - loss.detach() + losses.sum(), losses, shares.to(losses.dtype))

    def _over_ranks(
        self, logits: Tensor, in_groups: list[Tensor], asked: Sequence[Asked]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the group that is asked: the largest logit, the logarithm of the sum of exponentials, the right class's
        logit, and how many logits are the largest; [Q, N] each.
        """
        inside = torch.stack([torch.where(one, logits, -math.inf).amax(1) for one in in_groups])
        _all_reduce(inside, dist.ReduceOp.MAX)
        sums = torch.stack(
            [
                torch.where(one, (logits - largest[:, None]).exp(), 0).sum(1)
                for one, largest in zip(in_groups, inside, strict=True)
            ]
        )
        right = torch.stack([torch.where(self._is_right(one), logits, 0).sum(1) for one in asked])
        same = [(one & (logits == most[:, None])).sum(1) for one, most in zip(in_groups, inside, strict=True)]
        summed = torch.stack([sums, right, torch.stack(same).to(sums.dtype)])
        _all_reduce(summed, dist.ReduceOp.SUM)
        return inside, inside + summed[0].log(), summed[1], summed[2]

    def _is_right(self, asked: Asked) -> Tensor:
        """Which of this rank's rows is that of a sample's class, bool [N, rows]."""
        places = self.starts[asked.groups] + asked.classes - self._rows.first
        numbers = torch.arange(len(self.group_of_row), device=places.device)
        return (places[:, None] == numbers) & (self.group_of_row >= 0)

    def _add_gradient(self, wrong: Tensor, x: Tensor) -> None:
        """The gradient of this rank's rows by the loss of a step, a mean over ranks and micro-batches."""
        rows, share = self._rows.rows, 1 / (self._micro_batches * world_size())
        if self._gradient is None or self._num_seen == 0:
            self._gradient = torch.zeros_like(rows)
        # In place: a product beside it would be as large as the layer.
        self._gradient[:, :-1].addmm_(wrong.T.to(rows.dtype), x.detach().to(rows.dtype), alpha=share)
        self._gradient[:, -1].add_(wrong.sum(0), alpha=share)
        self._num_seen = (self._num_seen + 1) % self._micro_batches

    @torch.no_grad()
    def update(self, lr: float, weight_decay: float) -> None:
        """A step of SGD, with the gradient of the last step's micro-batches."""
        assert self._gradient is not None and self._num_seen == 0
        self._rows.rows.sub_(self._gradient.add_(self._rows.rows, alpha=weight_decay), alpha=lr)
        self._gradient = None

    def tensor(self, mesh: DeviceMesh) -> DTensor:
        """All rows, for a checkpoint."""
        return self._rows.tensor(mesh)


def _all_reduce(numbers: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    if world_size() > 1:
        with exchanging("softmax of the head"):
            dist.all_reduce(numbers, op=operation)
