"""Which samples form step t: a pure function of the manifest's counts, the seed, the epoch and the step.

The epoch's order in four lines:

1. the shards are permuted by (seed, epoch) and laid end to end: N positions;
2. the first steps * B of them (B = global batch) are cut into C canonical streams of equal length, the rest (less
   than one batch, others in every epoch) is left out;
3. inside a stream, each window of `shuffle_window` positions is permuted by a keyed bijection;
4. step t takes the next B / C positions of every stream, stream after stream; rank r of R trains on the r-th of R
   equal pieces of that list (of each of its micro-batches).

So ranks and loader workers change who reads a sample, never which samples form a step; resuming is arithmetic;
memory is O(shards), whatever the number of samples; and a stream reads few shards at a time, in a known order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from largescale.data.random import hash_coordinates, permute
from shards.errors import InputError


class Order:
    """The order of all samples over all steps of a run.

    Args:
        shard_sizes: samples of each shard, in the manifest's order.
        seed: the run's seed.
        global_batch: images a step over all ranks.
        streams: canonical streams; divides global_batch.
        shuffle_window: positions of a stream that are shuffled among each other.

    Raises:
        InputError: when there are fewer samples than one global batch.
    """

    def __init__(
        self, shard_sizes: list[int], *, seed: int, global_batch: int, streams: int, shuffle_window: int
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.first_ids = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.num_samples = int(self.first_ids[-1])
        self.seed, self.global_batch = seed, global_batch
        self.streams, self.window = streams, shuffle_window
        if self.num_samples < global_batch:
            raise InputError(
                f"data.shards holds {self.num_samples} samples, train.global_batch={global_batch} needs at least "
                f"as many; lower train.global_batch"
            )
        self.steps_per_epoch = self.num_samples // global_batch
        self.left_out = self.num_samples % global_batch
        self._epoch_layout = lru_cache(maxsize=2)(self._layout)

    def epoch(self, step: int) -> int:
        """The epoch that a global step belongs to, from 0."""
        return step // self.steps_per_epoch

    def samples(self, step: int) -> np.ndarray:
        """Ids (position in the manifest, shard by shard) of the global batch of `step`: int64 [global_batch]."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        per_stream = self.global_batch // self.streams
        stream_length = self.steps_per_epoch * per_stream
        stream = np.repeat(np.arange(self.streams), per_stream)
        place = np.tile(step_in_epoch * per_stream + np.arange(per_stream), self.streams)

        window_start = place // self.window * self.window
        window_size = np.minimum(self.window, stream_length - window_start)
        key = hash_coordinates(self.seed, epoch, stream, window_start)
        shuffled = window_start + permute(place - window_start, window_size, key)
        return self._ids_at(stream * stream_length + shuffled, epoch)

    def _ids_at(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        permuted_shards, ends = self._epoch_layout(epoch)
        slot = np.searchsorted(ends, positions, side="right")
        shard = permuted_shards[slot]
        return self.first_ids[shard] + positions - (ends[slot] - self.shard_sizes[shard])

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and the position at which each ends."""
        keys = hash_coordinates(self.seed, epoch, np.arange(len(self.shard_sizes)), 1)
        permuted = np.argsort(keys, kind="stable")
        return permuted, np.cumsum(self.shard_sizes[permuted])


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
