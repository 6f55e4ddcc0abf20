"""The images of a batch: read, decoded once, cut into all their views, written to the buffers they are sent from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config, DataConfig
from largescale.data.augment import DRAWS
from largescale.data.cache import ShardLost
from largescale.data.crops import BOX_DRAWS, crop, on_grid, reduction, sample_boxes
from largescale.data.decode import EncodedImage
from largescale.data.order import Mixture, rank_places
from largescale.data.random import uniform
from largescale.data.reader import SampleError, ShardReader
from shards.errors import InputError

_BOX_PURPOSE, _AUGMENT_PURPOSE = 1, 2  # keep the random numbers of the two uses apart


@dataclass
class Buffers:
    """Where one batch is put together; carved from one piece of memory that is used again and again.

    Attributes:
        views: uint8 [num, B, 3, S, S] a crop group, channels last in memory.
        draws: uniform numbers for the augmentation, float64 [num, B, DRAWS] a crop group.
    """

    views: list[Tensor]
    draws: list[Tensor]

    @staticmethod
    def num_bytes(data: DataConfig, batch: int) -> int:
        """Bytes of the buffers of a batch, in whole pages."""
        needed = sum(group.num * batch * (3 * group.size**2 + 8 * DRAWS) for group in data.crops)
        return -(-needed // 4096) * 4096

    @staticmethod
    def carve(memory: Tensor, data: DataConfig, batch: int) -> Buffers:
        """Lay buffers over uint8 memory of `num_bytes`."""
        place, views, draws = 0, [], []

        def take(num_bytes: int) -> Tensor:
            nonlocal place
            place += num_bytes
            return memory[place - num_bytes : place]

        for group in data.crops:  # first what needs alignment
            draws.append(take(group.num * batch * DRAWS * 8).view(torch.float64).view(group.num, batch, DRAWS))
        for group in data.crops:
            pixels = take(group.num * batch * 3 * group.size**2)
            views.append(pixels.view(group.num, batch, group.size, group.size, 3).permute(0, 1, 4, 2, 3))
        return Buffers(views, draws)


@dataclass
class Part:
    """What is known about a part of a batch when its views are in the buffers.

    Attributes:
        ids: sample ids in order, those of substitutes where a sample was unreadable.
        keys: their WebDataset keys, if asked for (audit).
        skipped: a row for each unreadable sample met (shard, key, offset, reason).
        seconds: that all threads together spent, by what they did: read, decode, crop.
        counters: of the shard caches.
        error: set when the part cannot be made, in a line for the user.
        bug: set when making it failed as it never should: the traceback.
    """

    ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    error: str = ""
    bug: str = ""


class BatchMaker:
    """Makes any part of this rank's batch of any step: a pure function of (corpora, configuration, step)."""

    def __init__(self, reader: ShardReader, order: Mixture, config: Config, *, rank: int, world_size: int) -> None:
        self.reader, self.order, self.data, self.seed = reader, order, config.data, config.run.seed
        self.places = rank_places(
            config.train.global_batch, accumulate=config.train.accumulate, rank=rank, world_size=world_size
        )
        self._first_views = np.cumsum([0, *(group.num for group in config.data.crops)])

    def make(self, step: int, rows: slice, buffers: Buffers, threads: ThreadPoolExecutor | None) -> Part:
        """Fill these rows of the buffers. Errors are returned in the part."""
        part = Part(seconds={"read": 0.0, "decode": 0.0, "crop": 0.0})
        ids, epochs = (values[self.places[rows]] for values in self.order.samples(step))
        numbers = range(*rows.indices(len(self.places)))
        try:
            for used, skipped, seconds in (threads.map if threads else map)(
                lambda number, sample_id, epoch: self._fill(int(sample_id), int(epoch), number, buffers),
                numbers, ids, epochs,
            ):
                part.ids.append(used)
                part.skipped += skipped
                for name, spent in seconds.items():
                    part.seconds[name] += spent
            if self.data.audit:
                part.keys = [self.reader.key(used) for used in part.ids]
        except InputError as error:
            part.error = str(error)
            return part
        self._draw(np.array(part.ids), epochs, rows, buffers)
        part.counters = self.reader.take_counters()
        return part

    def _fill(
        self, sample_id: int, epoch: int, number: int, buffers: Buffers
    ) -> tuple[int, list[dict[str, Any]], dict[str, float]]:
        skipped: list[dict[str, Any]] = []
        for candidate in candidates(self.reader, sample_id, self.data.max_skipped_in_row, skipped):
            started = time.perf_counter()
            try:
                raw = self.reader.read(candidate)
                read = time.perf_counter()
                image = EncodedImage(raw, max_pixels=self.data.max_pixels)
                boxes = self._boxes(candidate, epoch, image)
                factor = 1
                if image.reducible:
                    factor = reduction(boxes, [group.size for group in self.data.crops], self.data.scaled_decode)
                pixels = image.decode(factor)
            except (SampleError, ShardLost) as error:
                skipped.append({**self.reader.describe(candidate), "reason": str(error)})
                continue
            decoded = time.perf_counter()
            for group, views, group_boxes in zip(self.data.crops, buffers.views, boxes, strict=True):
                if factor > 1:
                    group_boxes = on_grid(group_boxes, factor, image.height, image.width)
                for view, box in enumerate(group_boxes):
                    crop(pixels, box, group.size, views[view, number])
            spent = {"read": read - started, "decode": decoded - read, "crop": time.perf_counter() - decoded}
            return candidate, skipped, spent
        raise InputError(_nothing_readable(self.reader, skipped))

    def _boxes(self, sample_id: int, epoch: int, image: EncodedImage) -> list[np.ndarray]:
        boxes = []
        for group, first in zip(self.data.crops, self._first_views, strict=False):
            views = np.arange(first, first + group.num)
            draws = uniform(self.seed, epoch, sample_id, views, _BOX_PURPOSE, num=BOX_DRAWS)
            heights, widths = np.full(group.num, image.height), np.full(group.num, image.width)
            boxes.append(sample_boxes(draws, heights, widths, group.scale, group.ratio))
        return boxes

    def _draw(self, ids: np.ndarray, epochs: np.ndarray, rows: slice, buffers: Buffers) -> None:
        for group, first, draws in zip(self.data.crops, self._first_views, buffers.draws, strict=False):
            views = np.arange(first, first + group.num)[:, None]
            numbers = uniform(self.seed, epochs, ids, views, _AUGMENT_PURPOSE, num=DRAWS)
            draws[:, rows] = torch.from_numpy(numbers)


def candidates(reader: ShardReader, sample_id: int, limit: int, skipped: list[dict[str, Any]]) -> Iterator[int]:
    """A sample and those that may stand in for it, until `limit` of them were skipped."""
    for candidate in reader.candidates(sample_id):
        if len(skipped) >= limit:
            return
        yield candidate


def _nothing_readable(reader: ShardReader, skipped: list[dict[str, Any]]) -> str:
    last = skipped[-1]
    return (f"{last['shard']}: {len(skipped)} samples in a row cannot be read ({last['reason']}); run `shards verify "
            f"{reader.corpora[0].manifest.root}`, or raise data.max_skipped_in_row")
