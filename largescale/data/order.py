"""Which samples form step t: a pure function of the manifest's counts, the seed, the epoch and the step.

The epoch's order in four lines:

1. the N mod B samples (B = global batch) that do not fill a batch are left out: in turn, so that over many epochs every
   sample is used equally often, or once less;
2. the shards are permuted by (seed, epoch) and laid end to end without those samples, and the positions are cut into C
   canonical streams of equal length;
3. inside a stream, each window of `shuffle_window` positions is permuted by a keyed bijection;
4. step t takes the next B / C positions of every stream, stream after stream; rank r of R trains on the r-th of R
   equal pieces of that list (of each of its micro-batches).

So ranks and loader workers change who reads a sample, never which samples form a step; resuming is arithmetic;
memory is O(shards + B), whatever the number of samples; and a stream reads few shards at a time, in a known order.

Several corpora share the canonical streams by weight, and each goes through its own epochs in its streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from largescale.data.random import hash_coordinates, permute
from shards.ground.errors import InputError

Steps = TypeVar("Steps", int, np.ndarray)

VERSION = 2
"""Version of the order, kept in checkpoints. Version 1 left out the last positions: with one shard, always the same."""


@dataclass(frozen=True)
class Layout:
    """How an epoch lays its samples end to end.

    Attributes:
        shards: the permuted shards, int64 [S].
        ends: the position at which each ends, all samples counted, int64 [S].
        used_ends: the same without the samples that are left out.
        before_gap: used positions before each sample that is left out, in order, int64 [N mod B].
    """

    shards: np.ndarray
    ends: np.ndarray
    used_ends: np.ndarray
    before_gap: np.ndarray


@dataclass(frozen=True)
class Uses:
    """When shards are read: one row per stretch of a stream that lies in one shard, sorted by first step.

    Attributes:
        shard, stream: numbers, int64 [N].
        first_step, end_step: the steps that may read it there, the end exclusive, int64 [N].
    """

    shard: np.ndarray
    stream: np.ndarray
    first_step: np.ndarray
    end_step: np.ndarray

    def of_streams(self, streams: np.ndarray) -> Uses:
        """The rows of these streams."""
        return self._rows(np.isin(self.stream, streams))

    def between(self, step: int, end: int) -> Uses:
        """The rows that are not over before `step`, and begin before `end`."""
        return self._rows((self.end_step > step) & (self.first_step < end))

    def peak_bytes(self, shard_bytes: np.ndarray, ahead: int = 0) -> int:
        """Most bytes of shards read at the same time, by readers up to `ahead` steps ahead; a shard that several
        streams read counts once.
        """
        shard = np.concatenate([self.shard, self.shard])
        times = np.concatenate([self.first_step - ahead, self.end_step])
        change = np.repeat([1, -1], len(self.shard))
        by_shard = np.lexsort((-change, times, shard))
        readers = np.cumsum(change[by_shard])  # of one shard: those of the shards before have left
        turns = by_shard[np.where(change[by_shard] > 0, readers == 1, readers == 0)]  # the first comes, the last leaves
        by_time = turns[np.lexsort((change[turns], times[turns]))]  # at equal times, ends come first
        return int(np.cumsum(change[by_time] * shard_bytes[shard[by_time]]).max(initial=0))

    @staticmethod
    def joined(parts: list[Uses]) -> Uses:
        """All rows, by their first step."""
        rows = [
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("shard", "stream", "first_step", "end_step")
        ]
        by_first_step = np.argsort(rows[2], kind="stable")
        return Uses(*(column[by_first_step] for column in rows))

    def _rows(self, chosen: np.ndarray) -> Uses:
        return Uses(self.shard[chosen], self.stream[chosen], self.first_step[chosen], self.end_step[chosen])


class Order:
    """The order of the samples of one corpus over all steps of a run.

    Args:
        shard_sizes: samples of each shard, in the manifest's order.
        seed: the run's seed.
        global_batch: images per step over all ranks.
        streams: canonical streams; divides global_batch.
        shuffle_window: positions of a stream that are shuffled together.

    Raises:
        InputError: when there are fewer samples than one global batch.
    """

    def __init__(
        self, shard_sizes: list[int] | np.ndarray, *, seed: int, global_batch: int, streams: int, shuffle_window: int
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.first_ids = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.num_samples = int(self.first_ids[-1])
        self.seed, self.global_batch = seed, global_batch
        self.streams, self.window = streams, shuffle_window
        if self.num_samples < global_batch:
            raise InputError(
                f"data.shards holds {self.num_samples} samples, fewer than train.global_batch={global_batch}; lower "
                f"train.global_batch"
            )
        self.steps_per_epoch = self.num_samples // global_batch
        self.left_out = self.num_samples % global_batch
        self.per_stream = global_batch // streams
        self._epoch_layout = lru_cache(maxsize=2)(self._layout)

    def epoch(self, step: Steps) -> Steps:
        """The epoch that a global step belongs to, from 0."""
        return step // self.steps_per_epoch

    def samples(self, steps: int | np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
        """Ids (position in the manifest, shard by shard) of the samples at some places of the global batches of some
        steps, which are broadcast against each other; of all places of a batch where none are given: int64.
        """
        steps, places = np.broadcast_arrays(steps, np.arange(self.global_batch) if places is None else places)
        epochs, step_in_epoch = np.divmod(steps, self.steps_per_epoch)
        stream, offset = np.divmod(places, self.per_stream)
        place = step_in_epoch * self.per_stream + offset

        # The last window of a stream may be shorter; a full-size permutation there would lead into the next stream, and
        # samples would be used twice.
        stream_length = self.steps_per_epoch * self.per_stream
        window_start = place // self.window * self.window
        window_size = np.minimum(self.window, stream_length - window_start)
        # A key of its own per window: with one key for all, equally long windows would all get the same permutation.
        key = hash_coordinates(self.seed, epochs, stream, window_start)
        shuffled = window_start + permute(place - window_start, window_size, key)
        return self._ids_at(stream * stream_length + shuffled, epochs)

    def uses(self, epoch: int) -> Uses:
        """Which steps of an epoch may read which shard."""
        layout = self._epoch_layout(epoch)
        stream_length = self.steps_per_epoch * self.per_stream
        starts = np.unique(np.concatenate([np.arange(self.streams) * stream_length, layout.used_ends]))
        starts = starts[starts < self.streams * stream_length]
        last = np.append(starts[1:], self.streams * stream_length) - 1
        shard = layout.shards[np.searchsorted(layout.used_ends, starts, side="right")]
        stream = starts // stream_length
        first_window = (starts - stream * stream_length) // self.window * self.window
        window_end = ((last - stream * stream_length) // self.window + 1) * self.window
        first_step = epoch * self.steps_per_epoch + first_window // self.per_stream
        end_step = epoch * self.steps_per_epoch - (-np.minimum(window_end, stream_length) // self.per_stream)
        return Uses.joined([Uses(shard, stream, first_step, end_step)])

    def _ids_at(self, used: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        ids = np.empty(used.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            layout = self._epoch_layout(epoch)
            chosen = epochs == epoch
            position = used[chosen] + np.searchsorted(layout.before_gap, used[chosen], side="right")
            slot = np.searchsorted(layout.ends, position, side="right")
            shard = layout.shards[slot]
            ids[chosen] = self.first_ids[shard] + position - (layout.ends[slot] - self.shard_sizes[shard])
        return ids

    def _layout(self, epoch: int) -> Layout:
        keys = hash_coordinates(self.seed, epoch, np.arange(len(self.shard_sizes)), 1)
        shards = np.argsort(keys, kind="stable")
        ends = np.cumsum(self.shard_sizes[shards])
        starts = np.empty(len(shards), np.int64)
        starts[shards] = ends - self.shard_sizes[shards]
        ids = self._left_out_of(epoch)
        shard = np.searchsorted(self.first_ids, ids, side="right") - 1
        gaps = np.sort(starts[shard] + ids - self.first_ids[shard])
        return Layout(shards, ends, ends - np.searchsorted(gaps, ends), gaps - np.arange(len(gaps)))

    def _left_out_of(self, epoch: int) -> np.ndarray:
        """The samples that an epoch leaves out: the next ones of a shuffled round that goes on from epoch to epoch."""
        turn = (epoch * self.left_out + np.arange(self.left_out)) % self.num_samples
        return permute(turn, self.num_samples, hash_coordinates(self.seed, 2))


class Mixture:
    """The order of one or more corpora: a global batch takes its share from each.

    Args:
        shard_sizes: samples of each shard, for each corpus.
        weights: relative share of each corpus in every batch; rounded to steps of 1 / streams,
            and every corpus has at least one stream.
        seed, global_batch, streams, shuffle_window: as for `Order`.

    Raises:
        InputError: a corpus has fewer samples than its share of a batch, or there are more corpora than streams.
    """

    def __init__(
        self,
        shard_sizes: list[np.ndarray],
        weights: list[float],
        *,
        seed: int,
        global_batch: int,
        streams: int,
        shuffle_window: int,
    ) -> None:
        self.per_stream = global_batch // streams
        self.stream_counts = share_streams(weights, streams)
        if len(weights) > 1:
            self._check_shares([int(np.sum(sizes)) for sizes in shard_sizes], global_batch)
        self.orders = [
            Order(
                sizes,
                seed=seed + number,
                global_batch=count * self.per_stream,
                streams=count,
                shuffle_window=shuffle_window,
            )
            for number, (sizes, count) in enumerate(zip(shard_sizes, self.stream_counts, strict=True))
        ]
        self.num_samples = sum(order.num_samples for order in self.orders)
        self.steps_per_epoch = self.num_samples // global_batch
        self.left_out = sum(order.left_out for order in self.orders)
        self._first_ids = np.cumsum([0, *(order.num_samples for order in self.orders)])
        self._first_shards = np.cumsum([0, *(len(sizes) for sizes in shard_sizes)])
        self._first_streams = np.cumsum([0, *self.stream_counts])

    def _check_shares(self, totals: list[int], global_batch: int) -> None:
        for number, (total, count) in enumerate(zip(totals, self.stream_counts, strict=True), 1):
            share = count * self.per_stream
            if total < share:
                raise InputError(
                    f"data.shards: corpus {number} of {len(totals)} holds {total} samples, fewer than its share of "
                    f"{share} of train.global_batch={global_batch}; "
                    f"{'give it a smaller weight' if count > 1 else 'raise data.streams'}, or lower train.global_batch"
                )

    def epoch(self, step: int) -> int:
        """The epoch of the run, which has as many samples as all corpora together. Each corpus also counts its own."""
        return step // self.steps_per_epoch

    def samples(self, steps: int | np.ndarray, places: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids, counted through the corpora, at some places of the global batches of some steps (broadcast against each
        other; all places of a batch where none are given), and each one's epoch in its corpus.

        Returns:
            Two int64 arrays of the broadcast shape.
        """
        first_places = self._first_streams * self.per_stream
        steps, places = np.broadcast_arrays(steps, np.arange(first_places[-1]) if places is None else places)
        ids, epochs = np.empty((2, *places.shape), np.int64)
        for number, order in enumerate(self.orders):
            own = (first_places[number] <= places) & (places < first_places[number + 1])
            if own.any():
                ids[own] = order.samples(steps[own], places[own] - first_places[number]) + self._first_ids[number]
                epochs[own] = order.epoch(steps[own])
        return ids, epochs

    def uses(self, step: int) -> Uses:
        """Which steps read which shard (counted through the corpora), for each corpus's epoch at `step` and the next.

        Memory O(shards).
        """
        parts = []
        for number, order in enumerate(self.orders):
            for epoch in (order.epoch(step), order.epoch(step) + 1):
                found = order.uses(epoch)
                parts.append(
                    Uses(
                        found.shard + self._first_shards[number],
                        found.stream + self._first_streams[number],
                        found.first_step,
                        found.end_step,
                    )
                )
        return Uses.joined(parts)

    def streams_at(self, places: np.ndarray) -> np.ndarray:
        """The streams that feed these places of a batch."""
        return np.unique(places // self.per_stream)


def share_streams(weights: list[float], streams: int) -> list[int]:
    """Streams of each corpus: one each, and the rest by largest remainder."""
    if len(weights) > streams:
        raise InputError(
            f"data.shards lists {len(weights)} corpora, which needs data.streams >= {len(weights)}, got {streams}"
        )
    wanted = np.asarray(weights, np.float64) / sum(weights) * streams
    counts = np.maximum(1, np.floor(wanted)).astype(int)
    while counts.sum() != streams:
        if counts.sum() < streams:
            counts[np.argmax(wanted - counts)] += 1
        else:
            counts[np.argmax(np.where(counts > 1, counts - wanted, -np.inf))] -= 1
    return counts.tolist()


def share_error(weights: list[float], streams: int) -> float:
    """The largest factor by which a corpus has more or less of a batch than its weight asks for."""
    asked = np.asarray(weights, np.float64) / sum(weights)
    ratio = np.asarray(share_streams(weights, streams)) / streams / asked
    return float(np.maximum(ratio, 1 / ratio).max())


def rank_places(global_batch: int, *, accumulate: int, rank: int, world_size: int) -> np.ndarray:
    """The places of every global batch that a rank trains on, micro-batch after micro-batch.

    The batch is cut into micro-batches first and these are cut over the ranks, so that which samples meet in a
    micro-batch does not depend on the number of ranks.

    Returns:
        int64 [global_batch / world_size].

    Raises:
        InputError: when the ranks do not divide a micro-batch.
    """
    if global_batch % (world_size * accumulate):
        micro_batches = f" in train.accumulate={accumulate} micro-batches" if accumulate > 1 else ""
        raise InputError(
            f"train.global_batch={global_batch}{micro_batches} is not divisible by {world_size} ranks; choose a "
            f"multiple of {world_size * accumulate} and of data.streams, or another number of ranks"
        )
    return np.arange(global_batch).reshape(accumulate, world_size, -1)[:, rank].reshape(-1)
