"""Offline phases: before certain steps all ranks embed the whole corpus, and the method makes something of it. A phase
that works on what the method holds already embeds nothing.

Which steps these are follows from the configuration, and so does what the network sees: images of the size of a large
view, whatever `evaluate` says (`evaluate.batch` is how many at a time, and changes roundings alone). What comes of a
phase is state of the method, in every checkpoint. One is saved before each phase; a run that is stopped or killed in a
phase begins it again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from largescale.clustering.fixed_point import NotFinite
from largescale.config import Config
from largescale.data.stream import Stream
from largescale.evaluate.extract import features_of
from largescale.methods.phase import PlainEmbeddings, no_embeddings, own_ids, with_plain_images
from largescale.parallel.batchnorm import average_statistics
from largescale.parallel.engine import Engine
from largescale.processes import world_size
from largescale.run.failures import TrainingStopped

_SAID = 4
"""Lines in the log while a large corpus is embedded."""
_LARGE = 40
"""Batches of a rank from which on there are any."""

_DIVERGED = (
    "weights or BatchNorm's statistics have diverged. Start from an earlier checkpoint "
    "(init_from=CHECKPOINT, in another run.dir) with a lower optim.lr"
)

_log = logging.getLogger(__name__)


class Phases:
    """The phases of a run.

    Args:
        config, stream, engine, device: of the run.
        skipped: told the step and a row per image of this rank that could not be read.
    """

    def __init__(
        self,
        config: Config,
        stream: Stream,
        engine: Engine,
        device: torch.device,
        skipped: Callable[[int, list[dict[str, Any]]], None],
    ) -> None:
        self._config, self._engine, self._device = with_plain_images(config), engine, device
        self._corpora, self._num_samples = stream.corpora, stream.length.num_samples
        self._tell_skipped = skipped
        self._found: dict[str, float] = {}
        self._unread: list[int] = []

    def due(self, step: int) -> bool:
        """Whether a phase comes before a step."""
        return self._engine.method.phase_due(step)

    def before(self, step: int, beat: Callable[[str], None], asked: Callable[[], str]) -> str:
        """The phase before a step, if there is one.

        Args:
            step: about to be done.
            beat: told what is being done, so that nobody takes it for a hang.
            asked: says why this rank is to stop; empty if it is not.

        Returns:
            Why the phase was left, for the next start to begin it again; empty if it is done.

        Raises:
            InputError: the whole folder of shards is away; a shard that is lost is as many images that cannot be read.
            TrainingStopped: embeddings, or what the method makes of them, are not finite.

        Collectives: every rank must call it; those of `average_statistics`, of `Engine.embed` and an all-reduce of a
        number on the host for each batch, one of whether embeddings are finite, the method's.
        """
        if not self.due(step):
            return ""

        def beat_or_leave(what: str) -> None:
            beat(what)
            _leave_if_any_rank_is_asked_to(asked())

        started = time.perf_counter()
        beat(f"step {step}: offline phase")
        average_statistics(self._engine.method)
        try:
            embeds = self._engine.method.phase_embeds(step)
            corpus = self._embed(step, beat_or_leave) if embeds else no_embeddings()
            embedded = time.perf_counter()
            found = self._engine.method.phase(step, corpus, beat_or_leave)
        except _Left as left:
            return str(left)
        except NotFinite as error:
            raise TrainingStopped(f"phase before step {step}: {error}: {_DIVERGED}") from error
        seconds = time.perf_counter() - started
        for name, spent in (("phase_s", seconds), ("phase_embedding_s", embedded - started)):
            self._found[name] = self._found.get(name, 0.0) + spent
        self._found |= found
        words = ", ".join(f"{name} {value:.4g}" for name, value in found.items()) or "done"
        _log.info(
            "offline phase before step %d: %s; %.1f s, of which embedding %.1f s",
            step,
            words,
            seconds,
            embedded - started,
        )
        return ""

    def measures(self) -> dict[str, float]:
        """Columns of metrics.jsonl about the phases since the last call: what was found, how many images could not be
        read (`phase_skipped`, and their share `phase_skipped_rate`), and seconds.
        """
        found, self._found = self._found, {}
        return found

    def unread(self) -> list[int]:
        """Ids of this rank's images that phases since the last call could not read."""
        found, self._unread = self._unread, []
        return found

    def _embed(self, step: int, beat: Callable[[str], None]) -> PlainEmbeddings:
        """Embeddings of this rank's images. All ranks call the network equally often, with batches of one size."""
        size, own = self._config.evaluate.batch, own_ids(self._num_samples)
        batches = [np.arange(start, min(start + size, own.stop)) for start in range(own.start, own.stop, size)]
        calls = math.ceil(math.ceil(self._num_samples / world_size()) / size)
        sums = self._engine.method.phase_sums(step)
        rows, bad = _Sum() if sums else _Rows(len(own)), torch.zeros((), dtype=torch.int64, device=self._device)
        done = 0

        def network(images: Tensor) -> Tensor:
            nonlocal done
            done += 1
            beat(f"step {step}: embedding the corpus, batch {done} of {calls}")
            if calls >= _LARGE and done % (calls // _SAID) == 0:
                _log.info("step %d: embedding the corpus, %d%%", step, 100 * done // calls)
            whole = images.new_zeros(size, *images.shape[1:])
            whole[: len(images)] = images
            vectors = self._engine.embed(whole, step)[: len(images)]  # in the network's precision
            bad.add_((~vectors.isfinite()).any(1).sum())
            rows.add(vectors)
            return vectors[:, :0]  # nothing need go to the host

        ids, side = [torch.empty(0, dtype=torch.int64)], self._config.evaluate.size
        skipped: list[dict[str, Any]] = []
        found = features_of(self._corpora, self._config, {"": network}, batches, self._device, without_lost=True)
        with closing(found) as source:
            for part in source:
                ids.append(part.crops.ids - own.start)
                skipped += part.crops.skipped
        while done < calls:  # where other ranks have more images, or more that can be read
            network(torch.zeros(0, 3, side, side, device=self._device))
        self._judge(step, skipped, int(bad))
        read = torch.cat(ids)
        assert bool((read.diff() > 0).all()), "rows are in the order of ids"
        readable = torch.zeros(len(own), dtype=torch.bool).index_fill_(0, read, True)
        self._unread += (own.start + (~readable).nonzero()[:, 0]).tolist()
        return PlainEmbeddings(rows.filled(), readable.to(self._device))

    def _judge(self, step: int, skipped: list[dict[str, Any]], num_bad: int) -> None:
        """Say what could not be read, or made nothing of. Collectives: one all-reduce."""
        self._tell_skipped(step, skipped)
        totals = torch.tensor([len(skipped), num_bad])
        if world_size() > 1:
            dist.all_reduce(totals)
        unread, bad = totals.tolist()
        if bad:
            raise TrainingStopped(
                f"phase before step {step}: embeddings of {bad:,} of {self._num_samples:,} images are not finite: "
                + _DIVERGED
            )
        if unread:
            _log.warning(
                "phase before step %d: %d of %d images could not be read; skipped/ lists them",
                step,
                unread,
                self._num_samples,
            )
        before = self._found.get("phase_skipped", 0.0)
        self._found |= {"phase_skipped": before + unread, "phase_skipped_rate": unread / self._num_samples}


class _Left(Exception):
    """All ranks leave the phase; says why."""


def _leave_if_any_rank_is_asked_to(why: str) -> None:
    """Collectives: one all-reduce of a number on the host, so that no rank waits for its device."""
    votes = torch.tensor([bool(why)], dtype=torch.int64)
    if world_size() > 1:
        dist.all_reduce(votes)
    if int(votes):
        raise _Left(f"by {why}" if why else "at another rank's request")


class _Rows:
    """Rows that come a few at a time, at most `count`: one copy of them."""

    def __init__(self, count: int) -> None:
        self._count, self._num, self._rows = count, 0, torch.empty(0)

    def add(self, some: Tensor) -> None:
        """Add rows [n, D]."""
        if self._rows.dim() == 1:
            self._rows = some.new_empty(self._count, some.shape[1])
        self._rows[self._num : self._num + len(some)] = some
        self._num += len(some)

    def filled(self) -> Tensor:
        """All rows [m, D]."""
        return self._rows[: self._num]


class _Sum:
    """The sum of rows that come a few at a time, in float64."""

    def __init__(self) -> None:
        self._sum = torch.empty(0)

    def add(self, some: Tensor) -> None:
        """Add rows [n, D]."""
        more = some.sum(0, keepdim=True, dtype=torch.float64)
        self._sum = more if self._sum.dim() == 1 else self._sum + more

    def filled(self) -> Tensor:
        """Their sum [1, D]."""
        return self._sum
