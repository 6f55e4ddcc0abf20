"""Sums up the steps of a logging interval: throughput, waiting, and the signs of the method."""

from __future__ import annotations

import resource
import time
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.distributed as dist

from largescale.data.loaded import Batch
from largescale.distributed.collectives import sum_over_ranks
from largescale.methods.method import Method, Output
from largescale.parallel.engine import StepCheck
from largescale.parallel.precision import LossScale
from largescale.processes import world_size

_COSTS = ("read_s", "decode_s", "crop_s", "augment_s", "queue_depth", "hits", "misses", "fetched_bytes", "evicted")
"""Costs of batches, as counted by the stream."""


class Meter:
    """Collects one logging interval.

    Args:
        method: declares the signs and what they mean.
        global_batch: images per step over all ranks.
        num_samples: images per epoch.
        device: where the signs are summed.
        loss_scale: of the run, logged with fp16.
        unread: those that this run has counted before.

    Attributes:
        unread: what could not be read and was counted, once however often it is drawn, of all ranks: ids of samples,
            and of supports `SHARD/KEY`.
    """

    def __init__(
        self,
        method: Method,
        global_batch: int,
        num_samples: int,
        device: torch.device,
        loss_scale: LossScale | None = None,
        unread: Iterable[int | str] = (),
    ) -> None:
        self._loss_scale = loss_scale if loss_scale and loss_scale.enabled else None
        self._method, self._global_batch, self._num_samples, self._device = method, global_batch, num_samples, device
        self.unread = set(unread)
        self.reset()

    def reset(self) -> None:
        """Forget the interval and start a new one."""
        self._started, self._steps, self._data_wait, self._loss, self._skipped = time.perf_counter(), 0, 0.0, 0.0, 0
        self._costs = dict.fromkeys(_COSTS, 0.0)
        self._images, self._updates_skipped = 0, 0
        self._reported = dict.fromkeys(self._method.signs, 0)
        self._met: set[int | str] = set()
        self._signs = {
            name: torch.zeros(sign.shape, device=self._device, dtype=torch.float64)
            for name, sign in self._method.signs.items()
        }

    def add(self, output: Output, check: StepCheck, data_wait: float, batch: Batch) -> None:
        """Add one step to the interval."""
        self._steps += 1
        self._data_wait += data_wait
        self._loss += check.loss
        self._updates_skipped += check.overflow
        self._skipped += len(batch.substituted)  # not rows of the ledger, since neighbours meet the same images
        self._met |= {*batch.substituted, *batch.unread_supports}
        self._images += len(batch.ids)
        for name, value in batch.costs.items():
            self._costs[name] += value
        for name, sign in output.signs.items():
            self._signs[name] += sign
            self._reported[name] += 1

    def summary(self, unread_in_phases: Collection[int] = ()) -> dict[str, Any]:
        """The interval's metrics, equal on all ranks except for times.

        Args:
            unread_in_phases: ids of samples that this rank could not read beside those of batches.

        Collectives: every rank must call it; one all-reduce of 11 numbers and those of the signs, and
        an all-gather after the steps in which an unreadable sample or support was met for the first time.
        """
        self._met = self._met.union(unread_in_phases) - self.unread
        sums = sum_over_ranks(
            {
                "skipped": torch.tensor([float(self._skipped), float(len(self._met))], device=self._device),
                "costs": torch.tensor(list(self._costs.values()), device=self._device, dtype=torch.float64),
                **self._signs,
            }
        )
        costs = dict(zip(_COSTS, sums["costs"].tolist(), strict=True))
        signs = {
            name: sums[name] / (self._reported[name] * world_size() if sign.over == "mean" else 1)
            for name, sign in self._method.signs.items()
            if self._reported[name]  # a method in stages does not report all in all steps
        }
        loss = self._loss / self._steps
        seconds = time.perf_counter() - self._started
        (skipped, met), images = map(round, sums["skipped"].tolist()), self._images * world_size()
        row = {
            "interval_steps": self._steps,
            "skipped_in_interval": self._count_met() if met else 0,
            "skipped_rate": skipped / images,
            "loss": loss,
            **self._method.measures(loss, signs, min(self._steps * self._global_batch, self._num_samples)),
            "images_per_s": self._steps * self._global_batch / seconds,
            "data_wait_s": self._data_wait / self._steps,
            "step_s": seconds / self._steps,
            "peak_memory_bytes": _peak_memory(self._device),
            "read_ms": 1000 * costs["read_s"] / images,
            "decode_ms": 1000 * costs["decode_s"] / images,
            "crop_ms": 1000 * costs["crop_s"] / images,
            "augment_s": costs["augment_s"] / world_size() / self._steps,
            "queue_depth": costs["queue_depth"] / world_size() / self._steps,
        }
        if self._loss_scale:
            row |= {"loss_scale": float(self._loss_scale.factor), "updates_skipped": self._updates_skipped}
        if opened := costs["hits"] + costs["misses"]:
            row["cache_hit_rate"] = costs["hits"] / opened
        if opened or costs["fetched_bytes"]:
            row["fetched_bytes"] = costs["fetched_bytes"]
        return row

    def _count_met(self) -> int:
        """How many were met that cannot be read and were not counted before: ranks may meet the same.

        Collectives: every rank must call it; an all-gather.
        """
        met: list[set[int | str]] = [set()] * world_size()
        dist.all_gather_object(met, self._met)
        new = set().union(*met) - self.unread
        self.unread |= new
        return len(new)


def _peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far: of the GPU if there is one, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
