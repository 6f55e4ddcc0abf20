"""What stands in for a library whose own engine takes no fake tensors.

A stand-in does in a page what the library's engine does in a step: it holds the same tensors, copies gradients into the
same buffers and issues the same collectives, on fake tensors and in front of the real adapter of `largescale.parallel`.
So a plan needs neither library. The tests compare each with the library's own steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largescale.distributed import collectives
from largescale.methods.method import Method
from largescale.plan.trace import StepTrace


class Peaks(NamedTuple):
    """Bytes held: at the end of a forward pass beyond what is always held, and at most in the passes and the update."""

    kept: int
    passes: int
    update: int


class StandIn(nn.Module):
    """In the place of the library's wrapper around a method."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, *arguments: object) -> Any:
        """The output of the method itself."""
        return self.method(*arguments)

    def weights(self) -> list[Tensor]:
        """All copies of weights, or pieces of them, that this rank holds between two steps."""
        return list(self.method.parameters())

    def always_held(self) -> list[Tensor]:
        """What it holds all the time, but for the optimizer's state."""
        return self.weights()

    def observe(self, trace: StepTrace) -> None:
        """Called before the step, with the trace that it will run under."""

    def settle(self, trace: StepTrace, peaks: Peaks) -> Peaks:
        """Add to the trace of a step what could not be seen in it; returns what was held with that."""
        return peaks


def all_gather(whole: Tensor, piece: Tensor) -> None:
    """Fill a flat tensor with all ranks' pieces. Collectives: one all-gather, none for a single rank."""
    if dist.get_world_size() > 1:
        collectives.all_gather(whole, piece)


def in_one_piece(parameters: list[Tensor], numel: int) -> Tensor:
    """Make parameters views of one new flat tensor of `numel` elements."""
    flat = torch.empty(numel, dtype=parameters[0].dtype, device=parameters[0].device)
    start = 0
    for parameter in parameters:
        parameter.data = flat.narrow(0, start, parameter.numel()).view_as(parameter)
        start += parameter.numel()
    return flat
