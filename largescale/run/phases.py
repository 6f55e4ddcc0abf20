"""Offline phases: before certain steps all ranks embed the whole corpus, and the method makes something of it.

Which steps these are follows from the configuration. What comes of a phase is state of the method, in every checkpoint;
a run that is killed in a phase repeats the phase, since a checkpoint is saved before it unless none are wanted
(`checkpoint.every_steps=0`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config
from largescale.data.stream import Stream
from largescale.evaluate.extract import features_of
from largescale.methods.phase import PlainEmbeddings, own_ids
from largescale.parallel.batchnorm import average_statistics
from largescale.parallel.engine import Engine
from largescale.processes import world_size

_SAID = 4
"""Lines in the log while a large corpus is embedded."""
_LARGE = 40
"""Batches of a rank from which on there are any."""

_log = logging.getLogger(__name__)


class Phases:
    """The phases of a run.

    Args:
        config, stream, engine, device: of the run.
    """

    def __init__(self, config: Config, stream: Stream, engine: Engine, device: torch.device) -> None:
        self._config, self._corpora, self._engine, self._device = config, stream.corpora, engine, device
        self._num_samples = stream.length.num_samples
        self._found: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether a phase comes before a step."""
        return self._engine.method.phase_due(step)

    def before(self, step: int, beat: Callable[[str], None]) -> None:
        """The phase before a step, if there is one.

        Args:
            step: about to be done.
            beat: told what is being done, so that nobody takes it for a hang.

        Raises:
            InputError: the shards are away.

        Collectives: every rank must call it; one all-reduce, those of `Engine.embed` for each batch, the method's.
        """
        if not self.due(step):
            return
        started = time.perf_counter()
        beat(f"step {step}: embedding the corpus")
        average_statistics(self._engine.method)
        corpus = self._embed(step, beat)
        embedded = time.perf_counter()
        found = self._engine.method.phase(step, corpus, beat)
        seconds = time.perf_counter() - started
        self._found = {**found, "phase_s": self._found.get("phase_s", 0.0) + seconds}
        words = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        _log.info(
            "offline phase before step %d: %s; %.1f s, of which embedding %.1f s",
            step,
            words,
            seconds,
            embedded - started,
        )

    def measures(self) -> dict[str, float]:
        """Columns of metrics.jsonl about the phases since the last call: what was found, and seconds."""
        found, self._found = self._found, {}
        return found

    def _embed(self, step: int, beat: Callable[[str], None]) -> PlainEmbeddings:
        """Embeddings of this rank's images. All ranks call the network equally often, with batches of one size."""
        size, own = self._config.evaluate.batch, own_ids(self._num_samples)
        batches = [np.arange(start, min(start + size, own.stop)) for start in range(own.start, own.stop, size)]
        calls = math.ceil(math.ceil(self._num_samples / world_size()) / size)
        vectors: list[Tensor] = []

        def network(images: Tensor) -> Tensor:
            done = len(vectors) + 1
            beat(f"step {step}: embedding the corpus, batch {done} of {calls}")
            if calls >= _LARGE and done % (calls // _SAID) == 0:
                _log.info("step %d: embedding the corpus, %d%%", step, 100 * done // calls)
            whole = images.new_zeros(size, *images.shape[1:])
            whole[: len(images)] = images
            vectors.append(self._engine.embed(whole, step)[: len(images)])  # in the network's precision
            return vectors[-1]

        ids, side = [torch.empty(0, dtype=torch.int64)], self._config.evaluate.size
        with closing(features_of(self._corpora, self._config, {"": network}, batches, self._device)) as source:
            ids += [part.crops.ids - own.start for part in source]
        while len(vectors) < calls:  # where other ranks have more images, or more that can be read
            network(torch.zeros(0, 3, side, side, device=self._device))
        read, found = torch.cat(ids).to(self._device), torch.cat(vectors)
        vectors.clear()  # two copies at a time are enough
        rows = found.new_zeros(len(own), found.shape[1]).index_copy_(0, read, found)
        readable = torch.zeros(len(own), dtype=torch.bool, device=self._device).index_fill_(0, read, True)
        return PlainEmbeddings(rows, readable)
