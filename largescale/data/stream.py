"""The stream: shards to device batches of multi-crop views, exactly once, elastic, resumable, unkillable.

Batch t is this rank's share of the global batch of data step t, a pure function of (corpora, configuration, t). So the
state of the stream is t, resuming costs nothing, epochs need no restart of the loader processes, and neither their
number nor the number of ranks changes what a sample looks like.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch

from largescale.config import Config
from largescale.data.batches import BatchMaker
from largescale.data.corpora import Corpus, fingerprint, open_corpora
from largescale.data.fetcher import Fetcher, Needs, working_set
from largescale.data.frames import require_clips
from largescale.data.length import Length, num_steps_of
from largescale.data.loaded import Batch, DeviceBatches, Steps, joined
from largescale.data.loader import CONDUCTORS, Position
from largescale.data.loader_counts import counts_for
from largescale.data.order import Mixture, rank_places
from largescale.data.reader import ShardReader
from largescale.data.sounds import require_sound
from largescale.data.supports import open_supports, with_supports
from largescale.distributed.launch import own_launch
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)

_NEARLY = 0.8
"""Share of the cache that the first two epochs may take before shards of later ones are counted, too."""
_MOST_EPOCHS = 200
"""Of a run, that are looked at."""


def num_loading(config: Config) -> int:
    """How many processes and threads a rank is going to load data with, the fetcher's not counted."""
    data, loaders = config.data, 1 if config.method.supports() is None else 2
    processes, threads = counts_for(data, on_gpu=torch.cuda.is_available())
    return loaders * (processes * (1 + threads + CONDUCTORS) if processes else threads)


class Stream:
    """Iterates over device batches from a given step to the end of the run.

    Args:
        config: the run's configuration.
        rank, world_size: this process and the number of processes.
        device: where views go.
        dtype: of the augmented views; they are computed in float32 at least.

    Attributes:
        supports: the labelled images beside, if the method asks for them.

    Raises:
        InputError: missing or too few shards; a batch not divisible by the ranks; a cache that is too small; a
            folder without the sound that the method asks for.
    """

    def __init__(self, config: Config, *, rank: int, world_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.corpora = open_corpora(config.data)
        if (sound := config.method.sounds()) is not None:
            require_sound(self.corpora, sound)
        require_clips(config, self.corpora)
        self.fingerprint = fingerprint(self.corpora)
        self.order = Mixture(
            [corpus.shard_sizes() for corpus in self.corpora],
            [corpus.weight for corpus in self.corpora],
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            streams=config.data.streams,
            shuffle_window=config.data.shuffle_window,
        )
        self.num_steps = num_steps_of(config, self.order.steps_per_epoch)
        self.device, self.data, self._config = device, config.data, config
        self._rank, self._world_size = rank, world_size
        self._position = Position()
        launch = own_launch()
        self._local_rank = launch.local_rank if launch else 0
        self._local_ranks = launch.local_ranks if launch else int(world_size == 1)
        self.counts = counts_for(config.data, on_gpu=device.type == "cuda")
        own_places = rank_places(
            config.train.global_batch, accumulate=config.train.accumulate, rank=rank, world_size=world_size
        )
        self._own_streams = self.order.streams_at(own_places)
        node_streams = self._node_streams()
        self._check_cache(node_streams)
        self._needs = Needs(self.order, self.corpora, node_streams, self._position)
        reader = ShardReader(self.corpora, self._needs.next_use)
        self.batches = BatchMaker(reader, self.order, config, rank=rank, world_size=world_size)
        self.loaded = DeviceBatches(
            self.batches, device=device, dtype=dtype, counts=self.counts, position=self._position
        )
        self.supports = open_supports(config, rank=rank, world_size=world_size)
        if self.supports is not None:
            self._loaded_supports = DeviceBatches(
                self.supports.batches, device=device, dtype=dtype, counts=self.counts, position=Position()
            )
            self.fingerprint = with_supports(self.fingerprint, self.supports.fingerprint)

    @property
    def length(self) -> Length:
        """Of the run that this stream feeds."""
        order = self.order
        return Length(self.num_steps, order.steps_per_epoch, order.num_samples, order.left_out)

    @property
    def folders(self) -> list[Corpus]:
        """All shards that are read: the corpora, and where they are elsewhere those of supports."""
        if self.supports is None or self.supports.corpus.manifest.root in [one.manifest.root for one in self.corpora]:
            return self.corpora
        return [*self.corpora, self.supports.corpus]

    def check_files(self) -> None:
        """Check that this rank's part of the shards is there and whole.

        Raises:
            InputError: naming the first file that is not as its manifest says.
        """
        for corpus in self.folders:
            corpus.check_files(self._rank, self._world_size)

    def __call__(self, data_steps: Steps) -> Generator[Batch]:
        """Batches of these data steps, in this order, views augmented on the device; to be closed if left early.

        Raises:
            InputError: a store is away, or too many images in a row cannot be read.
            LoaderDied: a loader process ended.
        """
        first = next(iter(data_steps), None)
        if first is None:
            return
        self._position.set(first)
        if self.supports is None:
            yield from self._images(data_steps)
            return
        with closing(self._images(data_steps)) as batches, closing(self._loaded_supports(data_steps)) as labelled:
            for batch, beside in zip(batches, labelled, strict=True):
                yield joined(batch, beside, self.supports.of(beside, self.device))

    def _images(self, data_steps: Steps) -> Generator[Batch]:
        """Batches without supports."""
        if all(corpus.cache is None for corpus in self.corpora):
            yield from self.loaded(data_steps)
            return
        self._needs.end = max(data_steps) + 1
        fetcher = Fetcher(self.corpora, self._needs, self._own_streams, self.data.fetches)
        with closing(fetcher), closing(self.loaded(data_steps)) as batches:
            for batch in batches:
                for name, value in fetcher.attend().items():
                    batch.costs[name] = batch.costs.get(name, 0.0) + value
                yield batch

    def _node_streams(self) -> np.ndarray:
        """Streams that the ranks of this node read; all if it is not known which ranks these are."""
        local, first = self._local_ranks, self._rank - self._local_rank
        ranks = range(first, first + local) if local and first >= 0 else range(self._world_size)
        batch, accumulate = self._config.train.global_batch, self._config.train.accumulate
        places = [
            rank_places(batch, accumulate=accumulate, rank=number, world_size=self._world_size)
            for number in ranks
            if number < self._world_size
        ]
        return self.order.streams_at(np.concatenate(places))

    def _check_cache(self, node_streams: np.ndarray) -> None:
        def needed_at(step: int) -> int:
            return working_set(self.order, self.corpora, node_streams, ahead=self.data.prefetch + 2, step=step)

        needed = needed_at(0)
        capacity = min((corpus.cache.capacity for corpus in self.corpora if corpus.cache is not None), default=needed)
        if needed > capacity:
            raise InputError(self._too_small(capacity, needed))
        if needed > _NEARLY * capacity:  # other epochs read other shards together, and their sizes differ
            most = max(1, _MOST_EPOCHS // len(self.order.orders))
            starts = {
                step for order in self.order.orders for step in range(0, self.num_steps, order.steps_per_epoch)[:most]
            }
            if (needed := max(map(needed_at, starts))) > capacity and self._local_rank == 0:
                _log.warning("%s; a later epoch may end the run", self._too_small(capacity, needed))

    def _too_small(self, capacity: int, needed: int) -> str:
        return (
            f"data.cache_gb: the shard cache may take {capacity / 1e9:.3g} GB, but this node reads shards of "
            f"{needed / 1e9:.3g} GB at the same time; raise data.cache_gb (point data.cache at a larger disk if "
            f"needed), or lower data.shuffle_window={self.data.shuffle_window} or data.streams={self.data.streams}"
        )
