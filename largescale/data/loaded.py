"""From the buffers that loader processes fill to batches of augmented views on the device."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sized
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from largescale.config import DataConfig, augment_of_group
from largescale.data.augment import Augment
from largescale.data.batches import BatchMaker, Buffers, Part
from largescale.data.loader import Loader, Position
from largescale.data.views import Supports, Views
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
        skipped: one row per unreadable sample met (shard, key, offset, reason), of supports none.
        substituted: ids of the samples, no supports, that others stand in for, one per position of the batch.
        costs: what making it took, see `_costs`.
        supports: labelled images, if the method asks for them.
        sounds: of `Views`.
        support_keys: their keys, if asked for.
        unread_supports: such a row for each unreadable support met, by what identifies it, `SHARD/KEY`.
    """

    step: int
    ids: Tensor
    keys: list[str]
    views: list[Tensor]
    facts: dict[str, Tensor]
    skipped: list[dict[str, Any]]
    substituted: list[int]
    costs: dict[str, float]
    supports: Supports | None = None
    sounds: Tensor | None = None
    support_keys: list[str] = field(default_factory=list)
    unread_supports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def inputs(self) -> Views:
        """The part of the batch that the method sees."""
        ids = self.ids.to(self.views[0].device, non_blocking=True)
        return Views(self.views, ids, self.facts, self.supports, self.sounds)


class Steps(Sized, Iterable[int], Protocol):
    """Data steps in the order in which they are trained on, and how many they are."""


class DeviceBatches:
    """Loads what a maker makes of data steps, and augments it on the device.

    Args:
        maker: of batches.
        device: where views go.
        dtype: of the augmented views; they are computed in float32 at least.
        counts: loader processes, and threads of each.
        position: told the step that is taken.

    Attributes:
        augments: how views are augmented, by crop group; equal settings share what is compiled.
    """

    def __init__(
        self,
        maker: BatchMaker,
        *,
        device: torch.device,
        dtype: torch.dtype,
        counts: tuple[int, int],
        position: Position,
    ) -> None:
        self.maker, self.device = maker, device
        self._counts, self._position, self._data = counts, position, maker.data
        self.augments = _augments(maker.data, dtype)

    def __call__(self, data_steps: Steps) -> Generator[Batch]:
        """Batches of these data steps, in this order; to be closed if left early. Errors as of `Stream`."""
        processes, threads = self._counts
        loader = Loader(
            self.maker,
            data_steps,
            processes=processes,
            threads=threads,
            slots=self._data.prefetch,
            position=self._position,
            stall_s=self._data.store_stall_s,
            pin=self.device.type == "cuda",
        )
        with closing(loader):
            yield from (_on_gpu if self.device.type == "cuda" else _on_cpu)(self, loader, len(data_steps))

    def augmented(self, buffers: Buffers) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Views and facts, of buffers on the device with views [num * B, 3, S, S] and draws [num * B, DRAWS]."""
        views = [
            augment(pixels, draws)
            for augment, pixels, draws in zip(self.augments, buffers.views, buffers.draws, strict=True)
        ]
        facts = dict(buffers.facts)
        if "flips" in self.maker.facts:
            flips = [augment.flips(draws) for augment, draws in zip(self.augments, buffers.draws, strict=True)]
            facts["flips"] = torch.cat(flips).unflatten(0, (-1, len(self.maker.places)))
        return views, facts


def _augments(data: DataConfig, dtype: torch.dtype) -> list[Augment]:
    found: list[Augment] = []
    for place in range(len(data.crops)):
        config = augment_of_group(data, place)
        found.append(
            next((other for other in found if other.config == config), None)
            or Augment(config, data.mean, data.std, torch.promote_types(dtype, torch.float32), dtype)
        )
    return found


def _on_cpu(source: DeviceBatches, loader: Loader, num_steps: int) -> Generator[Batch]:
    for _ in range(num_steps):
        step, buffers, parts, depth = loader.take()
        raise_errors(parts)
        started = time.perf_counter()
        views, facts = source.augmented(
            Buffers(
                [pixels.flatten(0, 1) for pixels in buffers.views],
                [draws.flatten(0, 1) for draws in buffers.draws],
                {name: values.clone() for name, values in buffers.facts.items()},
            )
        )
        sounds = None if buffers.sounds is None else buffers.sounds.clone()
        loader.release()
        batch = _batch(step, views, facts, parts, depth, time.perf_counter() - started)
        yield replace(batch, sounds=sounds)


def _on_gpu(source: DeviceBatches, loader: Loader, num_steps: int) -> Generator[Batch]:
    """Copies run on their own stream, and the next one begins before the training has had this one, if it is there."""
    side, training = torch.cuda.Stream(source.device), torch.cuda.current_stream(source.device)
    ahead = None
    for number in range(num_steps):
        step, sent, parts, depth, copied = ahead or _send(source, loader, side)
        ahead = None
        training.wait_event(copied)
        for tensor in (*sent.views, *sent.draws, *sent.facts.values(), sent.sounds):
            if tensor is not None:
                tensor.record_stream(training)
        views, facts = source.augmented(sent)
        copied.synchronize()
        loader.release()
        if number + 1 < num_steps and loader.ready():
            ahead = _send(source, loader, side)
        yield replace(_batch(step, views, facts, parts, depth, 0.0), sounds=sent.sounds)


def _send(
    source: DeviceBatches, loader: Loader, side: torch.cuda.Stream
) -> tuple[int, Buffers, list[Part], int, torch.cuda.Event]:
    step, buffers, parts, depth = loader.take()
    raise_errors(parts)
    with torch.cuda.stream(side):
        sent = _to_device(buffers, source.device)
        copied = torch.cuda.Event()
        copied.record(side)
    return step, sent, parts, depth, copied


def _to_device(buffers: Buffers, device: torch.device) -> Buffers:
    views = [pixels.flatten(0, 1).to(device, non_blocking=True) for pixels in buffers.views]
    draws = [numbers.flatten(0, 1).to(device, non_blocking=True) for numbers in buffers.draws]
    facts = {name: values.to(device, non_blocking=True) for name, values in buffers.facts.items()}
    sounds = None if buffers.sounds is None else buffers.sounds.to(device, non_blocking=True)
    return Buffers(views, draws, facts, sounds)


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


def joined(batch: Batch, beside: Batch, supports: Supports) -> Batch:
    """A batch with what was loaded beside it."""
    costs = {name: value + beside.costs.get(name, 0.0) for name, value in batch.costs.items()}
    costs["queue_depth"] = min(batch.costs["queue_depth"], beside.costs["queue_depth"])
    return replace(
        batch,
        costs=costs,
        supports=supports,
        support_keys=beside.keys,
        unread_supports={f"{row['shard']}/{row['key']}": row for row in beside.skipped},
    )


def _batch(
    step: int, views: list[Tensor], facts: dict[str, Tensor], parts: list[Part], depth: int, augment_s: float
) -> Batch:
    ids = torch.tensor([sample_id for part in parts for sample_id in part.ids])
    keys = [key for part in parts for key in part.keys]
    skipped = list({(row["shard"], row["key"]): row for part in parts for row in part.skipped}.values())
    substituted = [sample_id for part in parts for sample_id in part.substituted]
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
