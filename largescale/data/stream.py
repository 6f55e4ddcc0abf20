"""The stream: shards to device batches of multi-crop views, exactly once, elastic, resumable, unkillable.

One DataLoader runs over global steps: item t of the data set is this rank's whole batch of step t, a pure function
of (manifest, config, t). So the state of the stream is t, resuming costs nothing, epochs need no restart of the
loader processes, and neither their number nor the number of ranks changes what a sample looks like.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from largescale import stopping
from largescale.config import Config, CropGroup, DataConfig
from largescale.data.augment import DRAWS, Augment
from largescale.data.crops import BOX_DRAWS, crop, sample_boxes
from largescale.data.decode import decode
from largescale.data.order import Order, rank_places
from largescale.data.random import uniform
from largescale.data.reader import SampleError, ShardReader
from shards.errors import InputError
from shards.manifest import Manifest, check_files, read_manifest

SUBSTITUTE_ATTEMPTS = 100
"""Neighbours of an unreadable sample that are tried before its shard is given up."""

_BOX_PURPOSE, _AUGMENT_PURPOSE = 1, 2  # keep the random numbers of the two uses apart


@dataclass
class Batch:
    """What one rank trains on in one step.

    Attributes:
        step: the data step (see `largescale/rollback.py` where it differs from the step of the run).
        ids: sample ids in order, int64 [B]; those of substitutes where a sample was unreadable.
        keys: their WebDataset keys, if asked for (audit).
        views: one uint8 tensor [num * B, 3, S, S] a crop group, view after view; after `Stream` float, augmented.
        draws: uniform numbers for the augmentation, float64 [num * B, DRAWS] a crop group.
        skipped: a row for each unreadable sample met (shard, key, offset, reason).
        error: set when the batch cannot be made; the loader process must not raise, a traceback would hide it.
    """

    step: int
    ids: Tensor
    keys: list[str]
    views: list[Tensor]
    draws: list[Tensor]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def pin_memory(self) -> Batch:
        """Page-locked copies, for asynchronous transfer to a GPU (called by DataLoader)."""
        self.views = [views.pin_memory() for views in self.views]
        self.draws = [draws.pin_memory() for draws in self.draws]
        return self


class StepBatches(Dataset[Batch]):
    """Maps a global step to this rank's batch."""

    def __init__(self, manifest: Manifest, order: Order, config: Config, *, rank: int, world_size: int) -> None:
        self.reader = ShardReader(manifest)
        self.order, self.data, self.seed = order, config.data, config.run.seed
        self.places = rank_places(
            order.global_batch, accumulate=config.train.accumulate, rank=rank, world_size=world_size
        )

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step. Errors are returned in the batch."""
        batch = Batch(step, torch.empty(0), [], [], [])
        try:
            self._fill(batch)
        except InputError as error:
            batch.error = str(error)
        return batch

    def _fill(self, batch: Batch) -> None:
        epoch = self.order.epoch(batch.step)
        wanted = self.order.samples(batch.step)[self.places]
        ids, images = self._decode_all(wanted, batch.skipped)
        batch.ids = torch.from_numpy(ids)
        if self.data.audit:
            batch.keys = [self.reader.key(int(i)) for i in ids]
        first_view = 0
        for group in self.data.crops:
            numbers = np.repeat(np.arange(first_view, first_view + group.num), len(ids))
            view_ids = np.tile(ids, group.num)
            boxes = uniform(self.seed, epoch, view_ids, numbers, _BOX_PURPOSE, num=BOX_DRAWS)
            batch.views.append(cut_views(images, group, boxes))
            draws = uniform(self.seed, epoch, view_ids, numbers, _AUGMENT_PURPOSE, num=DRAWS)
            batch.draws.append(torch.from_numpy(draws))
            first_view += group.num

    def _decode_all(self, wanted: np.ndarray, skipped: list[dict[str, Any]]) -> tuple[np.ndarray, list[Tensor]]:
        ids, images = wanted.copy(), []
        for place, sample_id in enumerate(wanted):
            ids[place], image = decode_or_substitute(self.reader, int(sample_id), self.data, skipped)
            images.append(image)
        return ids, images


def decode_or_substitute(
    reader: ShardReader, sample_id: int, data: DataConfig, skipped: list[dict[str, Any]]
) -> tuple[int, Tensor]:
    """Decode a sample, or the next readable one of its shard; every unreadable one met adds a row to `skipped`.

    Returns:
        The id of the sample used, and its image, uint8 [3, H, W].

    Raises:
        InputError: no readable sample within SUBSTITUTE_ATTEMPTS neighbours.
    """
    for attempt in range(SUBSTITUTE_ATTEMPTS):
        candidate = reader.substitute(sample_id, attempt)
        try:
            return candidate, decode(reader.read(candidate), max_pixels=data.max_pixels)
        except SampleError as error:
            skipped.append({**reader.describe(candidate), "reason": str(error)})
    shard = reader.describe(sample_id)["shard"]
    raise InputError(
        f"{reader.manifest.root / str(shard)}: {SUBSTITUTE_ATTEMPTS} samples in a row cannot be read "
        f"({skipped[-1]['reason']}); run `shards verify {reader.manifest.root}`"
    )


def cut_views(images: list[Tensor], group: CropGroup, draws: np.ndarray) -> Tensor:
    """All views of one crop group: uint8 [num * B, 3, size, size], view after view."""
    heights = np.tile([image.shape[1] for image in images], group.num)
    widths = np.tile([image.shape[2] for image in images], group.num)
    boxes = sample_boxes(draws, heights, widths, group.scale, group.ratio)
    views = torch.empty(len(boxes), 3, group.size, group.size, dtype=torch.uint8)
    for place, box in enumerate(boxes):
        crop(images[place % len(images)], box, group.size, views[place])
    return views


class Stream:
    """Iterates over device batches from a given step to the end of the run.

    Args:
        config: the run's configuration.
        rank, world_size: this process and the number of processes.
        device: where views go.
        dtype: of the augmented views.

    Raises:
        InputError: shards that are missing, cut or too few; a batch that the ranks do not divide.
    """

    def __init__(
        self, config: Config, *, rank: int, world_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.manifest = read_manifest(config.data.shards)
        check_files(self.manifest)
        self.order = Order(
            [shard.num_samples for shard in self.manifest.shards],
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            streams=config.data.streams,
            shuffle_window=config.data.shuffle_window,
        )
        self.num_steps = config.train.steps or max(1, round(config.train.epochs * self.order.steps_per_epoch))
        self.device, self.data = device, config.data
        self.batches = StepBatches(self.manifest, self.order, config, rank=rank, world_size=world_size)
        self.augment = Augment(config.data.augment, config.data.mean, config.data.std, dtype)

    def __call__(self, data_steps: Collection[int]) -> Generator[Batch]:
        """Batches of these data steps, in this order, views augmented on the device; to be closed if left early.

        Raises:
            InputError: a shard became unreadable.
        """
        workers = self.data.workers
        loader = DataLoader(
            self.batches,
            sampler=data_steps,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.data.prefetch if workers else None,
            collate_fn=_as_is,
            worker_init_fn=stopping.live_and_die_with_parent,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            if batch.error:
                raise InputError(batch.error)
            yield self._to_device(batch)

    @torch.no_grad()
    def _to_device(self, batch: Batch) -> Batch:
        send = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        batch.views = [
            self.augment(send(views), send(draws)) for views, draws in zip(batch.views, batch.draws, strict=True)
        ]
        return batch


def _as_is(batch: Batch) -> Batch:
    return batch
