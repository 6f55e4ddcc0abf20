"""The images of a batch: read, decoded once, cropped into all views, written to the buffers they are sent from."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config, DataConfig, SoundConfig
from largescale.data.augment_draws import DRAWS
from largescale.data.cache import ShardLost
from largescale.data.crops import BOX_DRAWS, BoxSampler, as_stored, crop, on_grid, reduction, turn
from largescale.data.decode import EncodedImage, Scratch
from largescale.data.order import rank_places
from largescale.data.random import uniform
from largescale.data.reader import SampleError, ShardReader
from largescale.data.sounds import Heard, SoundWindows
from shards.ground.errors import InputError
from shards.images.orientation import UPRIGHT

_TOO_LARGE = "more than data.max_pixels"  # the one reason fixed by a setting, not by restoring files

_BOX_PURPOSE, _AUGMENT_PURPOSE, _FRAME_PURPOSE = 1, 2, 3  # keep the random numbers of their uses apart

ORDER_BLOCK = 2048
"""Samples whose ids a process computes at once, some steps ahead: one at a time would cost as much as reading them."""


@dataclass
class Buffers:
    """Where one batch is assembled; carved from one piece of memory that is reused.

    Attributes:
        views: uint8 [num, B, 3, S, S] a crop group, channels last in memory.
        draws: uniform numbers for the augmentation, float64 [num, B, DRAWS] a crop group.
        boxes: of all views, as in `Views.facts`; None if the method does not ask for them.
        sounds: windows of sound, int16 [B, T], likewise.
    """

    views: list[Tensor]
    draws: list[Tensor]
    boxes: Tensor | None = None
    sounds: Tensor | None = None

    @staticmethod
    def num_bytes(data: DataConfig, batch: int, facts: Sequence[str] = (), sound: SoundConfig | None = None) -> int:
        """Bytes of the buffers of a batch, in whole pages."""
        numbers = DRAWS + (4 if "boxes" in facts else 0)
        needed = sum(group.num * batch * (3 * group.size**2 + 8 * numbers) for group in data.crops)
        needed += 2 * batch * sound.num_samples if sound else 0
        return -(-needed // 4096) * 4096

    @staticmethod
    def carve(
        memory: Tensor, data: DataConfig, batch: int, facts: Sequence[str] = (), sound: SoundConfig | None = None
    ) -> Buffers:
        """Lay buffers over uint8 memory of `num_bytes`."""
        place, views, draws = 0, [], []

        def take(num_bytes: int) -> Tensor:
            nonlocal place
            place += num_bytes
            return memory[place - num_bytes : place]

        for group in data.crops:  # first what needs alignment
            draws.append(take(group.num * batch * DRAWS * 8).view(torch.float64).view(group.num, batch, DRAWS))
        boxes, sounds, num_views = None, None, sum(group.num for group in data.crops)
        if "boxes" in facts:
            boxes = take(num_views * batch * 4 * 8).view(torch.int64).view(num_views, batch, 4)
        if sound:
            sounds = take(2 * batch * sound.num_samples).view(torch.int16).view(batch, -1)
        for group in data.crops:
            pixels = take(group.num * batch * 3 * group.size**2)
            views.append(pixels.view(group.num, batch, group.size, group.size, 3).permute(0, 1, 4, 2, 3))
        return Buffers(views, draws, boxes, sounds)


@dataclass
class Part:
    """What is known about a part of a batch once its views are in the buffers.

    Attributes:
        ids: sample ids in order, with substitutes in place of unreadable samples.
        keys: their WebDataset keys, if asked for (audit).
        skipped: one row per unreadable sample met (shard, key, offset, reason), however often it was met.
        substituted: rows of the batch whose sample was unreadable.
        seconds: spent by all threads together, by activity: read, decode, crop.
        counters: of the shard caches.
        error: set when the part cannot be made: one line for the user.
        no_memory: set when memory ran out: one line for the user.
        bug: set when making it failed unexpectedly: the traceback.
    """

    ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    substituted: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)
    error: str = ""
    no_memory: str = ""
    bug: str = ""


class Unreadable:
    """The unreadable samples met by a part of a batch, so that its other rows do not read them again.

    Forgotten with the part: which sample stands in for another must not depend on what a process has seen before.
    """

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self.reasons: dict[int, str] = {}

    def rows(self) -> list[dict[str, Any]]:
        """The ledger's row for each."""
        return [
            {**self._reader.describe(sample_id), "reason": reason} for sample_id, reason in sorted(self.reasons.items())
        ]

    def all_of(self, tried: list[int]) -> str:
        """The line for the user if no sample could stand in for another: what is wrong with most of those tried."""
        kinds = Counter(_TOO_LARGE if _TOO_LARGE in self.reasons[one] else self.reasons[one] for one in tried)
        kind, num = kinds.most_common(1)[0]
        example = next(one for one in tried if kind in self.reasons[one])
        remedy = (
            "raise it" if kind == _TOO_LARGE else f"{self._reader.remedy(example)}, or raise data.max_skipped_in_row"
        )
        failed = "" if num == len(tried) else f"; {num} of them failed with"
        shard = self._reader.describe(example)["shard"]
        return f"{shard}: {len(tried)} consecutive samples cannot be read{failed}: {self.reasons[example]}; {remedy}"


class Order(Protocol):
    """Which samples form which step."""

    def samples(self, steps: int | np.ndarray, places: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs, as of `Mixture`."""


class BatchMaker:
    """Makes any part of this rank's batch of any step: a pure function of (corpora, configuration, step)."""

    def __init__(self, reader: ShardReader, order: Order, config: Config, *, rank: int, world_size: int) -> None:
        self.reader, self.order, self.data, self.seed = reader, order, config.data, config.run.seed
        self.facts, self.sound = config.method.facts, config.method.sounds()
        self._windows = SoundWindows(self.sound, reader, self.seed) if self.sound else None
        self.places = rank_places(
            config.train.global_batch, accumulate=config.train.accumulate, rank=rank, world_size=world_size
        )
        groups_of_views = [group for group in config.data.crops for _ in range(group.num)]
        self._sizes = np.array([group.size for group in groups_of_views])
        self._sample_boxes = BoxSampler(
            *(np.array([getattr(group, name) for group in groups_of_views]) for name in ("scale", "ratio"))
        )
        self._own = threading.local()
        self._block = lru_cache(maxsize=2)(self._samples_of_block)

    def samples(self, step: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Ids and epochs of the samples in these rows of this rank's batch of `step`: int64 [rows]."""
        first, last, _ = rows.indices(len(self.places))
        num_steps = max(1, ORDER_BLOCK // max(1, last - first))
        ids, epochs = self._block(step // num_steps * num_steps, num_steps, first, last)
        return ids[step % num_steps], epochs[step % num_steps]

    def make(self, step: int, rows: slice, buffers: Buffers, threads: ThreadPoolExecutor | None) -> Part:
        """Fill these rows of the buffers. Errors that the user can fix are returned in the part."""
        part = Part(seconds={"read": 0.0, "decode": 0.0, "crop": 0.0})
        ids, epochs = self.samples(step, rows)
        draws = self._box_draws(ids, epochs)
        numbers, unreadable = range(*rows.indices(len(self.places))), Unreadable(self.reader)
        try:
            for used, seconds in (threads.map if threads else map)(
                lambda number, sample_id, epoch, draws: self._fill(
                    int(sample_id), epoch, draws, number, buffers, unreadable
                ),
                numbers,
                ids,
                epochs,
                draws,
            ):
                part.ids.append(used)
                for name, spent in seconds.items():
                    part.seconds[name] += spent
            if self.data.audit:
                part.keys = [self.reader.key(used) for used in part.ids]
        except InputError as error:
            part.error = str(error)
            return part
        part.skipped, part.substituted = unreadable.rows(), int((np.array(part.ids) != ids).sum())
        self._draw(np.array(part.ids), epochs, rows, buffers)
        part.counters = self.reader.take_counters()
        return part

    def _samples_of_block(self, step: int, num_steps: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        return self.order.samples(np.arange(step, step + num_steps)[:, None], self.places[first:last])

    def _fill(
        self, sample_id: int, epoch: np.int64, draws: np.ndarray, number: int, buffers: Buffers, unreadable: Unreadable
    ) -> tuple[int, dict[str, float]]:
        tried = []
        for candidate in islice(self.reader.candidates(sample_id), self.data.max_skipped_in_row):
            tried.append(candidate)
            if candidate in unreadable.reasons:
                continue
            started, what, lacking = time.perf_counter(), "an image", ""
            try:
                heard = self._windows.hear(candidate, int(epoch)) if self._windows else None
                raw = self.reader.read(candidate, partial(self._frame_of, candidate, epoch, heard))
                what = f"an image of {raw.width} x {raw.height} pixels"
                read = time.perf_counter()
                image = EncodedImage(raw, max_pixels=self.data.max_pixels)
                if candidate != sample_id:
                    draws = self._box_draws(np.array([candidate]), np.array([epoch]))[0]
                boxes = self._sample_boxes(draws, image.height, image.width)
                factor = reduction(boxes, self._sizes, self.data.scaled_decode) if image.reducible else 1
                pixels = image.decode(factor, self._scratch())
            except (SampleError, ShardLost) as error:
                unreadable.reasons[candidate] = str(error)
                continue
            except MemoryError as error:
                lacking = str(error) or f"not enough memory for {what}"
            if lacking:  # not from the first error: its frames hold what was read, and others need that memory
                raise MemoryError(lacking)
            decoded = time.perf_counter()
            if buffers.boxes is not None:
                buffers.boxes[:, number] = torch.from_numpy(boxes)
            if buffers.sounds is not None and heard is not None:
                buffers.sounds[number] = torch.from_numpy(heard.window)
            turned_later = image.orientation if factor > 1 else UPRIGHT
            if factor > 1:
                boxes = on_grid(as_stored(boxes, turned_later, image.height, image.width), factor, *image.stored)
            outs = [out for views in buffers.views for out in views[:, None, number].unbind()]
            for box, size, out in zip(boxes.tolist(), self._sizes.tolist(), outs, strict=True):
                crop(pixels, box, size, out)
                if turned_later != UPRIGHT:
                    turn(out, turned_later)
            spent = {"read": read - started, "decode": decoded - read, "crop": time.perf_counter() - decoded}
            return candidate, spent
        raise InputError(unreadable.all_of(tried))

    def _frame_of(self, sample_id: int, epoch: np.int64, heard: Heard | None, num_frames: int) -> int:
        """The frame of a clip that is seen in an epoch: with sound, one that is heard."""
        if heard is not None:
            return heard.frame
        return int(uniform(self.seed, int(epoch), sample_id, 0, _FRAME_PURPOSE, num=1)[0] * num_frames)

    def _box_draws(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Numbers for the boxes of all views of some samples: float64 [N, views, BOX_DRAWS]."""
        views = np.arange(len(self._sizes))
        return uniform(self.seed, epochs[..., None], ids[:, None], views, _BOX_PURPOSE, num=BOX_DRAWS)

    def _draw(self, ids: np.ndarray, epochs: np.ndarray, rows: slice, buffers: Buffers) -> None:
        views = np.arange(len(self._sizes))[:, None]
        numbers = torch.from_numpy(uniform(self.seed, epochs, ids, views, _AUGMENT_PURPOSE, num=DRAWS))
        for draws, own in zip(buffers.draws, numbers.split([group.num for group in self.data.crops]), strict=True):
            draws[:, rows] = own

    def _scratch(self) -> Scratch:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        return self._own.scratch
