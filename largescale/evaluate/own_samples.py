"""Which samples a rank has of a step, and their random numbers: of the whole batch the same on any number of ranks."""

from __future__ import annotations

import numpy as np

from largescale.processes import rank, world_size


class OwnSamples:
    """The order of a training: every epoch another permutation, of which whole batches are taken.

    Args:
        ids: of all samples.
        batch: samples per step, over all ranks; a multiple of their number.
        seed: of orders and random numbers.
    """

    def __init__(self, ids: np.ndarray, batch: int, seed: int) -> None:
        self._ids, self._batch, self._seed = ids, batch, seed
        self._order = -1, ids

    def of(self, step: int) -> tuple[np.ndarray, list[np.random.Generator]]:
        """This rank's samples of a step, and a generator for each, which follows from its epoch and id alone."""
        epoch, place = divmod(step, len(self._ids) // self._batch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._ids)
        share = self._batch // world_size()
        start = place * self._batch + rank() * share
        ids = self._order[1][start : start + share]
        return ids, [np.random.default_rng([self._seed, epoch, int(one)]) for one in ids]
