"""DDP, whose exchange of gradients is written in C++, which takes no fake tensors: one all-reduce of all gradients is
added to the step of the bare method, and the buckets, which hold the gradients from the first step on.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from largescale.config import Config
from largescale.methods.swav import SwAV
from largescale.optim import build_optimizer
from largescale.parallel.engine import Engine
from largescale.plan.stand_in import Peaks, StandIn
from largescale.plan.trace import WEIGHTS, Collective, StepTrace
from largescale.precision import AUTOCAST
from largescale.processes import world_size


class Buckets(StandIn):
    """In the place of DistributedDataParallel."""

    def settle(self, trace: StepTrace, peaks: Peaks) -> Peaks:
        """Add the exchange and the buckets."""
        if world_size() == 1:
            return peaks
        size = sum(parameter.nbytes for parameter in self.method.parameters())
        trace.add(Collective("all-reduce", world_size(), WEIGHTS), 1, size)
        return Peaks(peaks.kept, peaks.passes + size, peaks.update + size)


def build(method: SwAV, config: Config, device: torch.device, fake: FakeTensorMode) -> Engine:
    """The bare method in the engine of all strategies."""
    optimizer = build_optimizer(method, config.optim)
    return Engine(wrapped=Buckets(method), method=method, optimizer=optimizer, config=config, device=device,
                  autocast_dtype=AUTOCAST.get(config.train.precision))
