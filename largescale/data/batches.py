"""The images of a batch: read, decoded once, cropped into all views, written to the buffers they are sent from."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from largescale.config import Config, DataConfig, SoundConfig
from largescale.data import frames, sounds
from largescale.data.augment_draws import DRAWS
from largescale.data.cache import ShardLost
from largescale.data.clip_facts import microseconds
from largescale.data.crops import BOX_DRAWS, BoxSampler, as_stored, crop, on_grid, reduction, turn
from largescale.data.decode import EncodedImage, Scratch
from largescale.data.order import rank_places
from largescale.data.random import uniform, uniform_at
from largescale.data.reader import SampleError, ShardReader
from largescale.data.sounds import Heard, SoundWindows
from shards.ground.errors import InputError
from shards.images.orientation import UPRIGHT

_REMEDIES = {"more than data.max_pixels": "raise it", **frames.REMEDIES, **sounds.REMEDIES}
"""Of reasons that are fixed by a setting, not by restoring files."""

_BOX_PURPOSE, _AUGMENT_PURPOSE, _FRAME_PURPOSE, _TUPLE_PURPOSE = 1, 2, 3, 4  # keep numbers of their uses apart

_LOADED_FACTS = {"boxes": (torch.int64, (4,)), "times_us": (torch.int64, ())}
"""Type, of eight bytes, and shape of what is known of each view of each sample when it is made."""

ORDER_BLOCK = 2048
"""Samples whose ids a process computes at once, some steps ahead: one at a time would cost as much as reading them."""


@dataclass
class Buffers:
    """Where one batch is assembled; carved from one piece of memory that is reused.

    Attributes:
        views: uint8 [num, B, 3, S, S] a crop group, channels last in memory.
        draws: uniform numbers for the augmentation, float64 [num, B, DRAWS] a crop group.
        facts: those of `Views.facts` that are known when views are made, if the method asks for them.
        sounds: windows of sound, int16 [B, T], likewise.
    """

    views: list[Tensor]
    draws: list[Tensor]
    facts: dict[str, Tensor] = field(default_factory=dict)
    sounds: Tensor | None = None

    @staticmethod
    def num_bytes(data: DataConfig, batch: int, facts: Sequence[str] = (), sound: SoundConfig | None = None) -> int:
        """Bytes of the buffers of a batch, in whole pages."""
        numbers = DRAWS + sum(math.prod(shape) for name, (_, shape) in _LOADED_FACTS.items() if name in facts)
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
        loaded, sounds, num_views = {}, None, sum(group.num for group in data.crops)
        for name, (dtype, shape) in _LOADED_FACTS.items():
            if name in facts:
                size = (num_views, batch, *shape)
                loaded[name] = take(8 * math.prod(size)).view(dtype).view(size)
        if sound:
            sounds = take(2 * batch * sound.num_samples).view(torch.int16).view(batch, -1)
        for group in data.crops:
            pixels = take(group.num * batch * 3 * group.size**2)
            views.append(pixels.view(group.num, batch, group.size, group.size, 3).permute(0, 1, 4, 2, 3))
        return Buffers(views, draws, loaded, sounds)


@dataclass
class Part:
    """What is known about a part of a batch once its views are in the buffers.

    Attributes:
        ids: sample ids in order, with substitutes in place of unreadable samples.
        keys: their WebDataset keys, if asked for (audit).
        skipped: one row per unreadable sample met (shard, key, offset, reason), however often it was met.
        substituted: ids of the samples that others stand in for, one per row.
        seconds: spent by all threads together, by activity: read, decode, crop.
        counters: of the shard caches.
        error: set when the part cannot be made: one line for the user.
        no_memory: set when memory ran out: one line for the user.
        bug: set when making it failed unexpectedly: the traceback.
    """

    ids: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    substituted: list[int] = field(default_factory=list)
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
        kinds = Counter(
            next((key for key in _REMEDIES if key in self.reasons[one]), self.reasons[one]) for one in tried
        )
        kind, num = kinds.most_common(1)[0]
        example = next(one for one in tried if kind in self.reasons[one])
        remedy = _REMEDIES.get(kind) or f"{self._reader.remedy(example)}, or raise data.max_skipped_in_row"
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
        wanted = config.method.frame_tuples()
        self._frames = None if wanted is None else frames.FrameSampler(wanted)
        shared = (False, False) if wanted is None else (wanted.config.shared_boxes, wanted.config.shared_augment)
        views = np.arange(len(self._sizes))  # each has draws of its own, unless it shares those of view 0
        self._box_views, self._augment_views = (0 * views if one else views for one in shared)
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
        part.skipped, part.substituted = unreadable.rows(), ids[np.array(part.ids) != ids].tolist()
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
            if candidate != sample_id:
                draws = self._box_draws(np.array([candidate]), np.array([epoch]))[0]
            lacking = ""
            try:
                return candidate, self._show(candidate, epoch, draws, number, buffers)
            except (SampleError, ShardLost) as error:
                unreadable.reasons[candidate] = str(error)
            except MemoryError as error:
                lacking = str(error) or f"not enough memory for {self._own.what}"
            if lacking:  # not from the first error: its frames hold what was read, and others need that memory
                raise MemoryError(lacking)
        raise InputError(unreadable.all_of(tried))

    def _show(
        self, sample_id: int, epoch: np.int64, draws: np.ndarray, number: int, buffers: Buffers
    ) -> dict[str, float]:
        """Fill a row of the buffers with views of a sample; returns the seconds that each activity took."""
        seconds, self._own.what = {"read": 0.0, "decode": 0.0, "crop": 0.0}, "an image"
        started = time.perf_counter()
        for frame, views in self._frames_of(sample_id, epoch, number, buffers):
            raw = self.reader.read(sample_id, frame)
            self._own.what = f"an image of {raw.width} x {raw.height} pixels"
            read = time.perf_counter()
            image = EncodedImage(raw, max_pixels=self.data.max_pixels)
            boxes = self._sample_boxes(draws, image.height, image.width)[views]
            sizes = self._sizes[views]
            factor = reduction(boxes, sizes, self.data.scaled_decode) if image.reducible else 1
            pixels = image.decode(factor, self._scratch())
            decoded = time.perf_counter()
            if "boxes" in buffers.facts:
                buffers.facts["boxes"][views, number] = torch.from_numpy(boxes)
            turned_later = image.orientation if factor > 1 else UPRIGHT
            if factor > 1:
                boxes = on_grid(as_stored(boxes, turned_later, image.height, image.width), factor, *image.stored)
            outs = [out for group in buffers.views for out in group[:, None, number].unbind()][views]
            for box, size, out in zip(boxes.tolist(), sizes.tolist(), outs, strict=True):
                crop(pixels, box, size, out)
                if turned_later != UPRIGHT:
                    turn(out, turned_later)
            done = time.perf_counter()
            spent = {"read": read - started, "decode": decoded - read, "crop": done - decoded}
            seconds, started = {name: value + spent[name] for name, value in seconds.items()}, done
        return seconds

    def _frames_of(
        self, sample_id: int, epoch: np.int64, number: int, buffers: Buffers
    ) -> list[tuple[Callable[[int], int], slice]]:
        """What to read of a sample, and which views show it: one image or frame in all, or a frame in each; with facts
        and sound.
        """
        if self._frames is None:
            heard = self._windows.hear(sample_id, int(epoch)) if self._windows else None
            if buffers.sounds is not None and heard is not None:
                buffers.sounds[number] = torch.from_numpy(heard.window)
            return [(partial(self._frame_of, sample_id, epoch, heard), slice(None))]
        if (clip := self.reader.clip(sample_id)) is None:
            raise SampleError("is an image, not a clip")
        draws = uniform_at(self.seed, int(epoch), sample_id, 0, _TUPLE_PURPOSE, num=self._frames.num_draws)
        chosen = self._frames(clip, draws)
        if "times_us" in buffers.facts:
            buffers.facts["times_us"][:, number] = torch.from_numpy(microseconds(clip.times[chosen]))
        return [(partial(_given, int(frame)), slice(view, view + 1)) for view, frame in enumerate(chosen)]

    def _frame_of(self, sample_id: int, epoch: np.int64, heard: Heard | None, num_frames: int) -> int:
        """The frame of a clip that is seen in an epoch: with sound, one that is heard."""
        if heard is not None:
            return heard.frame
        return int(uniform_at(self.seed, int(epoch), sample_id, 0, _FRAME_PURPOSE, num=1)[0] * num_frames)

    def _box_draws(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Numbers for the boxes of all views of some samples: float64 [N, views, BOX_DRAWS]."""
        return uniform(self.seed, epochs[..., None], ids[:, None], self._box_views, _BOX_PURPOSE, num=BOX_DRAWS)

    def _draw(self, ids: np.ndarray, epochs: np.ndarray, rows: slice, buffers: Buffers) -> None:
        views = self._augment_views[:, None]
        numbers = torch.from_numpy(uniform(self.seed, epochs, ids, views, _AUGMENT_PURPOSE, num=DRAWS))
        for draws, own in zip(buffers.draws, numbers.split([group.num for group in self.data.crops]), strict=True):
            draws[:, rows] = own

    def _scratch(self) -> Scratch:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        return self._own.scratch


def _given(frame: int, num_frames: int) -> int:
    """A frame that was chosen before, whatever their number."""
    return frame
