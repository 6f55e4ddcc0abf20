"""DDP, whose exchange of gradients is written in C++, which takes no fake tensors: buckets that hold all gradients from
the start on, into which each is copied when it is there, and one all-reduce of all of them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from largescale.config import Config
from largescale.methods.method import Method
from largescale.optim.optimizers import build_optimizer
from largescale.parallel.engine import Engine
from largescale.parallel.precision import AUTOCAST
from largescale.plan.stand_in import Peaks, StandIn
from largescale.plan.trace import WEIGHTS, Collective, StepTrace
from largescale.processes import world_size


class Buckets(StandIn):
    """In the place of DistributedDataParallel; all buckets are one."""

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self._bucket = parameters[0].new_empty(sum(parameter.numel() for parameter in parameters))
        self._num_parameters = len(parameters)
        pieces = self._bucket.split([parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.register_post_accumulate_grad_hook(partial(_move, piece.view_as(parameter)))

    def always_held(self) -> list[Tensor]:
        """Weights, and the bucket that all gradients lie in."""
        return [*self.weights(), self._bucket]

    def settle(self, trace: StepTrace, peaks: Peaks) -> Peaks:
        """Add the all-reduce of the gradients. Each objective of the step sends the whole bucket, and where there are
        several in a run, which parameters have a gradient on some rank: a number for each.
        """
        count = len(self.method.objectives_of(self.method.length.num_steps - 1))
        if world_size() > 1:
            trace.add(Collective("all-reduce", world_size(), WEIGHTS), count, count * self._bucket.nbytes)
        if world_size() > 1 and len(self.method.objectives) > 1:
            trace.add(Collective("all-reduce", world_size(), WEIGHTS), count, count * 4 * self._num_parameters)
        return peaks


@torch.no_grad()
def _move(place: Tensor, parameter: Tensor) -> None:
    """Bring a parameter's gradient to its place in the bucket."""
    assert parameter.grad is not None
    if parameter.grad is not place:  # later micro-batches add to it there
        place.copy_(parameter.grad)
        parameter.grad = place


def build(method: Method, config: Config, device: torch.device, fake: FakeTensorMode) -> Engine:
    """The bare method in the engine of all strategies."""
    optimizer = build_optimizer(method, method.roles(), config.optim)
    return Engine(
        wrapped=Buckets(method),
        method=method,
        optimizer=optimizer,
        config=config,
        device=device,
        autocast_dtype=AUTOCAST.get(config.train.precision),
    )
