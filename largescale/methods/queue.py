"""Embeddings of earlier batches, as candidates for later ones: the same on all ranks, whatever their number.

The rows of step t, in the order of its global batch, take the place of those of step t - K / B, the oldest::

    for place in range(B):
        rows[(t * B + place) % K] = embeddings[place]

so where a row stands follows from its step and its place in the batch, and there is no pointer to keep. A step's own
rows go in when the next step asks for rows: before, nothing sees them, and the backward pass needs the old ones. So the
queue is written in place, never copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import normalize

from largescale.config import Config, require
from largescale.config.setting import setting
from largescale.data.length import Length
from largescale.distributed.collectives import gather_rows
from largescale.methods.choice import Choice
from largescale.methods.replicated import replicated
from largescale.methods.state_size import bytes_per_number
from largescale.processes import world_size

_FEW = 8
"""Share of the images, as 1 / _FEW, that a queue is suggested to hold; MoCo's holds a twentieth of ImageNet."""


def queue_setting(default: int = 65536) -> Any:
    """The setting of methods that have a queue: a field of a dataclass."""
    return setting(
        default,
        "Embeddings of earlier steps to pick from; a multiple of train.global_batch, fewer than the images.",
        at_least=1,
        at_most=2**40,
    )


def max_queue_setting(held: str = "which every rank holds") -> Any:
    """The setting of the most that queues may take: a field of a dataclass."""
    return setting(
        4.0,
        f"Largest size in GB of what is queued, {held}; more is refused before anything is read.",
        above=0,
        at_most=1e9,
        free=True,
    )


def require_queue(config: Config, num_rows: int, width: int, *, max_gb: float, queues: int = 1) -> None:
    """Refuse a queue that does not hold whole batches, or is too large.

    Args:
        config: of the run.
        num_rows: `method.queue`.
        width: of a row.
        max_gb: `method.max_queue_gb`, in GB (10^9 bytes).
        queues: of this size.

    Raises:
        InputError: naming the key.
    """
    batch = config.train.global_batch
    require(num_rows % batch == 0, "method.queue", num_rows, f"a multiple of train.global_batch={batch}")
    row = queues * width * bytes_per_number(config)
    size = num_rows * row / 1e9
    expected = (
        f"at most {int(max_gb * 1e9 / row) // batch * batch:,}, since {size:.3g} GB on every rank are more than "
        "method.max_queue_gb"
    )
    require(size <= max_gb, "method.queue", num_rows, f"{expected}={max_gb:g}")


def complaints_of_queue(config: Config, length: Length, num_rows: int) -> list[str]:
    """A line if a queue holds as many embeddings as there are images."""
    images, batch = length.num_samples, config.train.global_batch
    if num_rows < images:
        return []
    fewer = max(1, images // _FEW // batch) * batch
    return [
        f"method.queue={num_rows}: the queue holds every one of the {images:,} images, so each meets itself in it; "
        f"set method.queue={fewer}"
    ]


def suited_queue(config: Config, length: Length, num_rows: int) -> dict[str, Choice]:
    """`method.queue` of a recipe for this batch and corpus: whole batches, an eighth of the images at most."""
    batch, images = config.train.global_batch, length.num_samples
    rows = min(num_rows, images // _FEW) // batch * batch
    why = (
        "whole batches, as many as in the recipe this one follows"
        if rows > num_rows - batch
        else (f"whole batches, at most 1/{_FEW} of the images: few meet themselves in it")
    )
    return {"queue": Choice(max(batch, rows), why)}


class Queue(nn.Module):
    """The last `num_rows` embeddings.

    Args:
        config: of the run: its seed, batch and micro-batches.
        num_rows: K, a multiple of the batch.
        width: D.
        number: of this queue among those of a method; they start with different rows.

    """

    _rows: Tensor

    def __init__(self, config: Config, num_rows: int, width: int, *, number: int = 0) -> None:
        super().__init__()
        self._seed = config.run.seed + number
        self._batch, self._micro_batches = config.train.global_batch, config.train.accumulate
        self._piece = self._batch // self._micro_batches // world_size()
        self.register_buffer("_rows", torch.zeros(num_rows, width), persistent=False)
        self._fresh: list[Tensor] = []
        self._due: tuple[int, Tensor] | None = None
        self.finish_initialisation()

    @property
    def rows(self) -> Tensor:
        """All rows [K, D], the same on all ranks; unit rows of random directions at first. Of a step, to be asked for
        before `keep`: from then on until the backward pass is through, the graph holds them.
        """
        self._write_due()
        return self._rows

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self._rows, self._due = rows, None

    def finish_initialisation(self) -> None:
        """Fill the queue with random unit rows; `models.initialise` calls it as well."""
        generator = torch.Generator().manual_seed(self._seed)
        rows = torch.randn(self._rows.shape, generator=generator, device="cpu")
        with torch.no_grad():
            self._rows.copy_(normalize(rows, dim=1))

    @torch.no_grad()
    def keep(self, embeddings: Tensor, step: int) -> None:
        """Take this rank's embeddings [B, D] of a step, or those of one of its micro-batches.

        Collectives: those of `gather_rows`, once, without a gradient.
        """
        self._write_due()
        # Ranks hold a piece of each micro-batch: [ranks, micro-batches, B, D].
        pieces = gather_rows(embeddings.detach()).view(world_size(), -1, self._piece, embeddings.shape[1])
        self._fresh += pieces.transpose(0, 1).flatten(1, 2).to(self._rows.dtype)
        if len(self._fresh) == self._micro_batches:
            self._due = step * self._batch % len(self._rows), torch.cat(self._fresh)
            self._fresh.clear()

    @torch.no_grad()
    def _write_due(self) -> None:
        if self._due:
            first, fresh = self._due
            self._rows[first : first + len(fresh)] = fresh
            self._due = None

    def whole(self, mesh: DeviceMesh) -> Tensor:
        """The rows, as a part of `Method.state`: all ranks hold all of them."""
        return replicated(self.rows, mesh)
