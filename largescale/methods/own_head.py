"""A linear layer that is state of a method, not a parameter: plain SGD of its own, at a constant rate and without
momentum. No optimizer holds anything of it that would have to be forgotten when it is drawn again.

    for x, k, w in rows:
        loss += -log softmax(W x + b)[k] w / n
    W, b = W, b - lr (their gradient, averaged over ranks and micro-batches, + weight_decay W, b)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largescale.distributed.collectives import exchanging
from largescale.methods.feature_clusters import drawn_head
from largescale.processes import world_size

_ROWS = 1024
"""That are drawn together."""


class OwnHead(nn.Module):
    """The layer.

    Args:
        width: of what it sees, F.
        micro_batches: of a step.
        lr: learning rate.
        weight_decay: of weights and biases.

    Attributes:
        rows: W and b side by side, [K, F + 1]; none before `make_room`.
    """

    rows: Tensor

    def __init__(self, width: int, micro_batches: int, *, lr: float, weight_decay: float) -> None:
        super().__init__()
        self._micro_batches, self._lr, self._weight_decay = micro_batches, lr, weight_decay
        self.register_buffer("rows", torch.zeros(0, width + 1), persistent=False)
        self._gradient: Tensor | None = None
        self._num_seen = 0

    @property
    def begins_a_step(self) -> bool:
        """Whether the next micro-batch is the first of a step."""
        return self._num_seen == 0

    def make_room(self, count: int) -> None:
        """Take memory for so many classes, all zero."""
        self.rows = self.rows.new_zeros(count, self.rows.shape[1])

    @torch.no_grad()
    def draw(self, seed: int, step: int) -> None:
        """Fill it with random weights, a function of seed and step."""
        for start in range(0, len(self.rows), _ROWS):
            places = torch.arange(start, min(start + _ROWS, len(self.rows)), device=self.rows.device)
            self.rows[places] = drawn_head(places, self.rows.shape[1] - 1, seed=seed, step=step).to(self.rows.dtype)

    def losses(self, x: Tensor, wanted: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean weighted cross entropy of a micro-batch, and the share of rows whose class is picked.

        Args:
            x: [n, F].
            wanted: class of each row, -1 for none, int64 [n].
            weights: of classes, [K].

        Collectives: in the last micro-batch of a step an all-reduce of the layer's gradient.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.rows.dtype))
            own = torch.where(wanted >= 0, weights[wanted.clamp_min(0)], 0).to(x.dtype)
            rows = self.rows.to(x.dtype)
            logits = torch.addmm(rows[:, -1], x, rows[:, :-1].T)
            losses = cross_entropy(logits, wanted, ignore_index=-1, reduction="none")
            self._add_gradient(logits.detach(), x.detach(), wanted, own)
        picked = (logits.detach().argmax(1) == wanted).to(x.dtype).mean()
        return (losses * own).mean(), picked

    @torch.no_grad()
    def _add_gradient(self, logits: Tensor, x: Tensor, wanted: Tensor, weights: Tensor) -> None:
        """Of this micro-batch, averaged over all of the step and over ranks once it is the last."""
        wrong = torch.softmax(logits, 1)
        wrong[torch.arange(len(x), device=x.device), wanted.clamp_min(0)] -= 1
        wrong *= weights[:, None] / (len(x) * self._micro_batches * world_size())
        own = torch.cat([wrong.T @ x, wrong.sum(0)[:, None]], dim=1).to(self.rows.dtype)
        self._gradient = own if self._gradient is None or self._num_seen == 0 else self._gradient + own
        self._num_seen = (self._num_seen + 1) % self._micro_batches
        if self._num_seen == 0 and world_size() > 1:
            with exchanging("gradient of the head"):
                dist.all_reduce(self._gradient)

    @torch.no_grad()
    def update(self) -> None:
        """Take a step. Collectives: none."""
        assert self._gradient is not None and self._num_seen == 0
        self._gradient += self._weight_decay * self.rows
        self.rows -= self._lr * self._gradient
        self._gradient = None
