"""Images as evaluation sees them: resized, centre-cropped, not augmented; by the training stream's decoder and loader.

A JPEG that is much larger than its crop is decoded at a half, a quarter or an eighth of its size, under the same rule
as in training (`data.scaled_decode`).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from largescale.config import Config, SoundConfig
from largescale.config.data_settings import CropGroup
from largescale.data.batches import BatchMaker, Buffers, Part
from largescale.data.cache import ShardLost
from largescale.data.corpora import Corpus
from largescale.data.crops import reduction
from largescale.data.decode import EncodedImage
from largescale.data.loaded import raise_errors
from largescale.data.loader import Loader, Position
from largescale.data.loader_counts import counts_for
from largescale.data.reader import RawSample, SampleError, ShardReader
from largescale.data.sounds import SoundWindows
from shards.ground.errors import InputError
from shards.images.orientation import UPRIGHT, turned

_LONG = 64
"""Images whose sides differ by no more than this factor are resized whatever `data.max_pixels` says."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CentreCrops:
    """One batch.

    Attributes:
        number: of the batch.
        images: those that could be read, uint8 [N, 3, S, S], on the device; on a CPU good until the next batch is asked
            for.
        ids: their sample ids, int64 [N].
        labels: their class numbers, -1 for none, int64 [N].
        keys: their WebDataset keys, if asked for.
        skipped: a row per image that could not be read (shard, key, offset, reason); each was named in a warning.
        sounds: windows of sound, int16 [N, T], on the device as the images; None if not asked for.
    """

    number: int
    images: Tensor
    ids: Tensor
    labels: Tensor
    keys: list[str]
    skipped: list[dict[str, Any]]
    sounds: Tensor | None = None


@dataclass
class _CentrePart(Part):
    """A part of a batch: also the labels, and which rows of the batch the images are in."""

    labels: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class CentreCropMaker:
    """Makes any part of any of the given batches.

    Args:
        corpora: what is read.
        config: how (`data`, `evaluate.resize` and `evaluate.size`).
        batches: sample ids of each batch, int64.
        keys: whether to look up WebDataset keys.
        frames: of each clip, evenly spaced; a sample has as many rows of a batch, one after the other. The one of 1, as
            that of an image, is the one that the index names: in the middle.
        sound: a window of it to read with every frame in the middle; samples without are left out.
        without_lost: samples of a shard that is lost are unreadable, as in training; else they end it.
    """

    facts: Sequence[str] = ()

    def __init__(
        self,
        corpora: Sequence[Corpus],
        config: Config,
        batches: Sequence[np.ndarray] = (),
        *,
        keys: bool = False,
        frames: int = 1,
        sound: SoundConfig | None = None,
        without_lost: bool = False,
    ) -> None:
        assert sound is None or frames == 1
        self._unreadable = (SampleError, ShardLost) if without_lost else (SampleError,)
        self.reader, self.batches, self.frames, self._keys = ShardReader(corpora), batches, frames, keys
        self.sound, self._windows = sound, SoundWindows(sound, self.reader, config.run.seed) if sound else None
        self._resize, self._margin = config.evaluate.resize, config.data.scaled_decode
        self._max_pixels = config.data.max_pixels
        self.data = replace(config.data, crops=[CropGroup(num=1, size=config.evaluate.size)])
        self.places = np.arange(frames * max(map(len, batches), default=0))

    def make(self, step: int, rows: slice, buffers: Buffers, threads: ThreadPoolExecutor | None) -> Part:
        """Fill these rows of the buffers; where the shards are away, the part has the line for the user."""
        part, ids = _CentrePart(), self.batches[step]
        num_rows = self.frames * len(ids)
        first, last, _ = rows.indices(len(self.places))
        numbers = range(first, min(last, num_rows))
        fill = partial(self._fill, ids, buffers)
        try:
            for number, why in zip(numbers, (threads.map if threads else map)(fill, numbers), strict=True):
                sample_id = int(ids[number // self.frames])
                if why:
                    part.skipped.append({**self.reader.describe(sample_id), "reason": why})
                    continue
                part.rows.append(number)
                part.ids.append(sample_id)
                part.labels.append(self.reader.label(sample_id))
                if self._keys:
                    part.keys.append(self.reader.key(sample_id))
        except InputError as error:
            part.error = str(error)
        return part

    def crop(self, sample_id: int, place: int = 0) -> Tensor:
        """The crop of an image, or of the frame in one of `frames` places of a clip: uint8 [3, S, S].

        Raises:
            SampleError: it cannot be read, or is too thin to be resized.
            InputError: its shard, or the whole folder, is away.
        """
        raw = self.reader.read(sample_id, partial(frame_at, place, self.frames))
        image = decode_near(raw, self._resize, max_pixels=self._max_pixels, margin=self._margin)
        self._check_resized(image.shape[1], image.shape[2])
        return centre_crop(image, self._resize, self.data.crops[0].size)

    def _check_resized(self, height: int, width: int) -> None:
        """Refuse a thin image that would be enlarged, whole, to gigabytes."""
        tall, wide, _, _ = crop_place(height, width, self._resize, self.data.crops[0].size)
        if tall * wide > self._max_pixels and max(tall, wide) > _LONG * min(tall, wide):
            raise SampleError(
                f"{width} x {height} pixels, {wide} x {tall} once resized, more than data.max_pixels={self._max_pixels}"
            )

    def _fill(self, ids: np.ndarray, buffers: Buffers, number: int) -> str:
        """Put one image into its row; returns why it cannot be read."""
        try:
            sample_id = int(ids[number // self.frames])
            buffers.views[0][0, number].copy_(self.crop(sample_id, number % self.frames))
            if buffers.sounds is not None and self._windows:
                buffers.sounds[number] = torch.from_numpy(self._windows.in_the_middle(sample_id))
        except self._unreadable as error:
            return str(error)
        return ""


def frame_at(place: int, num_places: int, num_frames: int) -> int:
    """The frame in the middle of the place-th of as many equal parts of a clip; a short clip shows some twice."""
    return (2 * place + 1) * num_frames // (2 * num_places)


def decode_near(sample: RawSample, side: int, *, max_pixels: int, margin: float) -> Tensor:
    """Decode upright, with the shorter side at least `margin` times as long as `side` where it is reduced.

    Returns:
        uint8 [3, H, W].

    Raises:
        SampleError: the bytes cannot be decoded.
    """
    image = EncodedImage(sample, max_pixels=max_pixels)
    whole = np.array([[0, 0, image.height, image.width]])
    factor = reduction(whole, np.array([side]), margin) if image.reducible else 1
    pixels = image.decode(factor)
    if factor == 1 or image.orientation == UPRIGHT:
        return pixels
    upright = np.ascontiguousarray(turned(pixels.permute(1, 2, 0).numpy(), image.orientation))
    return torch.from_numpy(upright).permute(2, 0, 1)


def centre_crop(image: Tensor, resize: int, size: int) -> Tensor:
    """Shorter side to `resize` pixels with antialiasing, then the centre square: uint8 [3, size, size]."""
    height, width, top, left = crop_place(image.shape[1], image.shape[2], resize, size)
    if (height, width) != image.shape[1:]:
        image = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return image[:, top : top + size, left : left + size]


def crop_place(height: int, width: int, resize: int, size: int) -> tuple[int, int, int, int]:
    """Height and width of an image that is resized for its centre square, and the square's top and left in it."""
    scale = resize / min(height, width)
    target = (max(size, round(height * scale)), max(size, round(width * scale)))
    return *target, (target[0] - size) // 2, (target[1] - size) // 2


def loader_of(
    maker: CentreCropMaker | BatchMaker, steps: range, config: Config, device: torch.device, *, in_process: bool = False
) -> Loader:
    """A loader of evaluation's batches: processes and threads as `data` says, or none but this one."""
    on_gpu = device.type == "cuda"
    processes, threads = counts_for(config.data, on_gpu=on_gpu)
    return Loader(
        maker,
        steps,
        processes=0 if in_process else processes,
        threads=threads,
        slots=config.data.prefetch,
        position=Position(),
        stall_s=config.data.store_stall_s,
        pin=on_gpu,
        batch_key="evaluate.batch",
    )


def centre_crops(
    corpora: Sequence[Corpus],
    config: Config,
    batches: Sequence[np.ndarray],
    device: torch.device,
    *,
    keys: bool = False,
    in_process: bool = False,
    frames: int = 1,
    sound: SoundConfig | None = None,
    without_lost: bool = False,
) -> Generator[CentreCrops]:
    """The given batches in order; to be closed if left early.

    Args:
        corpora, config, batches, keys, frames, sound, without_lost: as of `CentreCropMaker`.
        device: where images go.
        in_process: load in this process, whatever `data.workers` says.

    Raises:
        InputError: a shard, or the whole folder, is away.
        OutOfMemory, LoaderDied: a loader process ran out of memory, or ended by itself.
    """
    maker = CentreCropMaker(corpora, config, batches, keys=keys, frames=frames, sound=sound, without_lost=without_lost)
    on_gpu = device.type == "cuda"
    if not len(maker.places):
        return
    loader = loader_of(maker, range(len(batches)), config, device, in_process=in_process)
    side = torch.cuda.Stream(device) if on_gpu else None
    with closing(loader):
        for number, ids in enumerate(batches):
            _, buffers, parts, _ = loader.take()
            raise_errors(parts)
            images = buffers.views[0][0, : frames * len(ids)]
            sounds = None if buffers.sounds is None else buffers.sounds[: len(ids)]
            if side is not None:
                images = _sent(images, device, side)
                sounds = None if sounds is None else _sent(sounds, device, side)
                loader.release()
            yield _batch(number, images, sounds, cast(list[_CentrePart], parts))
            if side is None:
                loader.release()


def _sent(images: Tensor, device: torch.device, side: torch.cuda.Stream) -> Tensor:
    """A copy on the device, made on a stream of its own, so that the host need not wait for the network's work."""
    with torch.cuda.stream(side):
        there = images.to(device, non_blocking=True)
    side.synchronize()
    there.record_stream(torch.cuda.current_stream(device))
    return there


def _batch(number: int, images: Tensor, sounds: Tensor | None, parts: list[_CentrePart]) -> CentreCrops:
    skipped = [row for part in parts for row in part.skipped]
    for row in skipped:
        _log.warning("%s, key %s, is left out: %s", row["shard"], row["key"], row["reason"], extra={"all_ranks": True})
    if skipped:
        rows = torch.tensor([row for part in parts for row in part.rows], dtype=torch.int64, device=images.device)
        images, sounds = images[rows], None if sounds is None else sounds[rows]
    return CentreCrops(
        number,
        images,
        torch.tensor([one for part in parts for one in part.ids], dtype=torch.int64),
        torch.tensor([label for part in parts for label in part.labels], dtype=torch.int64),
        [key for part in parts for key in part.keys],
        skipped,
        sounds,
    )
