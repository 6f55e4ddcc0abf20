"""The stream: shards to device batches of multi-crop views, exactly once, elastic, resumable, unkillable.

Batch t is this rank's share of the global batch of data step t, a pure function of (corpora, configuration, t). So the
state of the stream is t, resuming costs nothing, epochs need no restart of the loader processes, and neither their
number nor the number of ranks changes what a sample looks like.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sized
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config, DataConfig, augment_of_group
from largescale.data.augment import Augment
from largescale.data.batches import BatchMaker, Buffers, Part
from largescale.data.corpora import fingerprint, open_corpora
from largescale.data.fetcher import Fetcher, Needs, working_set
from largescale.data.length import Length, num_steps_of
from largescale.data.loader import CONDUCTORS, Loader, Position, choose_counts
from largescale.data.order import Mixture, rank_places
from largescale.data.reader import ShardReader
from largescale.data.views import Views
from largescale.distributed.launch import own_launch
from largescale.distributed.out_of_memory import OutOfMemory
from shards.ground.errors import InputError


@dataclass
class Batch:
    """What one rank trains on in one step.

    Attributes:
        step: the data step (`largescale/run/rollback.py` explains when it differs from the step of the run).
        ids: sample ids in order, int64 [B]; with substitutes in place of unreadable samples.
        keys: their WebDataset keys, if asked for (audit).
        views: augmented, one tensor [num * B, 3, S, S] a crop group, view after view.
        facts: of `Views`.
        skipped: one row per unreadable sample met (shard, key, offset, reason).
        substituted: positions of the batch whose own sample was unreadable.
        costs: what making it took, see `_costs`.
    """

    step: int
    ids: Tensor
    keys: list[str]
    views: list[Tensor]
    facts: dict[str, Tensor]
    skipped: list[dict[str, Any]]
    substituted: int
    costs: dict[str, float]

    def inputs(self) -> Views:
        """The part of the batch that the method sees."""
        return Views(self.views, self.ids.to(self.views[0].device, non_blocking=True), self.facts)


def num_loading(data: DataConfig) -> int:
    """How many processes and threads a rank is going to load data with, the fetcher's not counted."""
    launch = own_launch()
    processes, threads = choose_counts(
        data.workers,
        data.threads,
        local_ranks=max(1, launch.local_ranks if launch else 1),
        on_gpu=torch.cuda.is_available(),
    )
    return processes * (1 + threads + CONDUCTORS) if processes else threads


class Steps(Sized, Iterable[int], Protocol):
    """Data steps in the order in which they are trained on, and how many they are."""


class Stream:
    """Iterates over device batches from a given step to the end of the run.

    Args:
        config: the run's configuration.
        rank, world_size: this process and the number of processes.
        device: where views go.
        dtype: of the augmented views; they are computed in float32 at least.

    Raises:
        InputError: missing or too few shards; a batch not divisible by the ranks; a cache that is too small.
    """

    def __init__(self, config: Config, *, rank: int, world_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.corpora = open_corpora(config.data)
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
        self.counts = choose_counts(
            config.data.workers,
            config.data.threads,
            local_ranks=max(1, self._local_ranks),
            on_gpu=device.type == "cuda",
        )
        own_places = rank_places(
            config.train.global_batch, accumulate=config.train.accumulate, rank=rank, world_size=world_size
        )
        self._own_streams = self.order.streams_at(own_places)
        node_streams = self._node_streams()
        self._check_cache(node_streams)
        num_shards = sum(len(corpus.manifest.shards) for corpus in self.corpora)
        self._needs = Needs(self.order, num_shards, node_streams, self._position)
        reader = ShardReader(self.corpora, self._needs.next_use)
        self.batches = BatchMaker(reader, self.order, config, rank=rank, world_size=world_size)
        self.augments = self._augments(dtype)

    def _augments(self, dtype: torch.dtype) -> list[Augment]:
        """How views are augmented, by crop group; equal settings share what is compiled."""
        data = self.data
        found: list[Augment] = []
        for place in range(len(data.crops)):
            config = augment_of_group(data, place)
            found.append(
                next((other for other in found if other.config == config), None)
                or Augment(config, data.mean, data.std, torch.promote_types(dtype, torch.float32), dtype)
            )
        return found

    def augmented(self, buffers: Buffers) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Views and facts, of buffers on the device with views [num * B, 3, S, S] and draws [num * B, DRAWS]."""
        views = [
            augment(pixels, draws)
            for augment, pixels, draws in zip(self.augments, buffers.views, buffers.draws, strict=True)
        ]
        facts = {} if buffers.boxes is None else {"boxes": buffers.boxes}
        if "flips" in self.batches.facts:
            flips = [augment.flips(draws) for augment, draws in zip(self.augments, buffers.draws, strict=True)]
            facts["flips"] = torch.cat(flips).unflatten(0, (-1, len(self.batches.places)))
        return views, facts

    @property
    def length(self) -> Length:
        """Of the run that this stream feeds."""
        order = self.order
        return Length(self.num_steps, order.steps_per_epoch, order.num_samples, order.left_out)

    def check_files(self) -> None:
        """Check that this rank's part of the shards is there and whole.

        Raises:
            InputError: naming the first file that is not as its manifest says.
        """
        for corpus in self.corpora:
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
        if all(corpus.cache is None for corpus in self.corpora):
            yield from self._loaded(data_steps)
            return
        fetcher = Fetcher(self.corpora, self._needs, self._own_streams, self.data.fetches)
        before = self.batches.reader.take_counters()  # of key look-ups; otherwise each loader process would report them
        with closing(fetcher), closing(self._loaded(data_steps)) as batches:
            for batch in batches:
                for name, value in (*fetcher.attend().items(), *before.items()):
                    batch.costs[name] = batch.costs.get(name, 0.0) + value
                before = {}
                yield batch

    def _loaded(self, data_steps: Steps) -> Generator[Batch]:
        processes, threads = self.counts
        loader = Loader(
            self.batches,
            data_steps,
            processes=processes,
            threads=threads,
            slots=self.data.prefetch,
            position=self._position,
            stall_s=self.data.store_stall_s,
            pin=self.device.type == "cuda",
        )
        with closing(loader):
            yield from (_on_gpu if self.device.type == "cuda" else _on_cpu)(self, loader, len(data_steps))

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
        needed = working_set(self.order, self.corpora, node_streams, ahead=self.data.prefetch + 2)
        capacity = min((corpus.cache.capacity for corpus in self.corpora if corpus.cache is not None), default=needed)
        if needed > capacity:
            raise InputError(
                f"data.cache_gb: the shard cache may take {capacity / 1e9:.3g} GB, but this node reads shards of "
                f"{needed / 1e9:.3g} GB at the same time; raise data.cache_gb (point data.cache at a larger disk if "
                f"needed), or lower data.shuffle_window={self.data.shuffle_window} or data.streams={self.data.streams}"
            )


def _on_cpu(stream: Stream, loader: Loader, num_steps: int) -> Generator[Batch]:
    for _ in range(num_steps):
        step, buffers, parts, depth = loader.take()
        raise_errors(parts)
        started = time.perf_counter()
        views, facts = stream.augmented(
            Buffers(
                [pixels.flatten(0, 1) for pixels in buffers.views],
                [draws.flatten(0, 1) for draws in buffers.draws],
                None if buffers.boxes is None else buffers.boxes.clone(),
            )
        )
        loader.release()
        yield _batch(step, views, facts, parts, depth, time.perf_counter() - started)


def _on_gpu(stream: Stream, loader: Loader, num_steps: int) -> Generator[Batch]:
    """Copies run on their own stream, and the next one begins before the training has had this one, if it is there."""
    side, training = torch.cuda.Stream(stream.device), torch.cuda.current_stream(stream.device)
    ahead = None
    for number in range(num_steps):
        step, sent, parts, depth, copied = ahead or _send(stream, loader, side)
        ahead = None
        training.wait_event(copied)
        for tensor in (*sent.views, *sent.draws, *([] if sent.boxes is None else [sent.boxes])):
            tensor.record_stream(training)
        views, facts = stream.augmented(sent)
        copied.synchronize()
        loader.release()
        if number + 1 < num_steps and loader.ready():
            ahead = _send(stream, loader, side)
        yield _batch(step, views, facts, parts, depth, 0.0)


def _send(
    stream: Stream, loader: Loader, side: torch.cuda.Stream
) -> tuple[int, Buffers, list[Part], int, torch.cuda.Event]:
    step, buffers, parts, depth = loader.take()
    raise_errors(parts)
    with torch.cuda.stream(side):
        sent = _to_device(buffers, stream.device)
        copied = torch.cuda.Event()
        copied.record(side)
    return step, sent, parts, depth, copied


def _to_device(buffers: Buffers, device: torch.device) -> Buffers:
    views = [pixels.flatten(0, 1).to(device, non_blocking=True) for pixels in buffers.views]
    draws = [numbers.flatten(0, 1).to(device, non_blocking=True) for numbers in buffers.draws]
    boxes = None if buffers.boxes is None else buffers.boxes.to(device, non_blocking=True)
    return Buffers(views, draws, boxes)


def raise_errors(parts: list[Part]) -> None:
    """Raise what went wrong in making any part of a batch.

    Raises:
        InputError: the user can fix it.
        OutOfMemory: a loader process ran out of memory.
    """
    for part in parts:
        if part.bug:
            raise RuntimeError(part.bug)
        if part.no_memory:
            raise OutOfMemory(part.no_memory)
        if part.error:
            raise InputError(part.error)


def _batch(
    step: int, views: list[Tensor], facts: dict[str, Tensor], parts: list[Part], depth: int, augment_s: float
) -> Batch:
    ids = torch.tensor([sample_id for part in parts for sample_id in part.ids])
    keys = [key for part in parts for key in part.keys]
    skipped = list({(row["shard"], row["key"]): row for part in parts for row in part.skipped}.values())
    substituted = sum(part.substituted for part in parts)
    return Batch(step, ids, keys, views, facts, skipped, substituted, _costs(parts, depth, augment_s))


def _costs(parts: list[Part], depth: int, augment_s: float) -> dict[str, float]:
    """Seconds of all loader threads by what they did, seconds of augmentation (on the CPU), batches that were ready
    besides, and what the shard caches did.
    """
    costs = {"augment_s": augment_s, "queue_depth": float(depth)}
    for part in parts:
        for name, value in (*((f"{name}_s", value) for name, value in part.seconds.items()), *part.counters.items()):
            costs[name] = costs.get(name, 0.0) + value
    return costs
