"""DeepSpeed's ZeRO stage 3 (0.19), as `largescale.parallel.zero` configures it.

Between steps a rank holds an even piece of every parameter (padded), the same in flat fp32 tensors that it updates, the
small parameters whole, one gradient piece of each, and a bucket. Gradients are copied into the bucket; a full bucket is
reduce-scattered behind the backward pass. What is gathered when follows from the order of the modules (fetching.py) and
is added to the trace of a step whose weights stay whole: two steps lie behind it, in which DeepSpeed learned the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largescale.distributed.collectives import exchanging, reduce_scatter
from largescale.methods.method import Method
from largescale.parallel.zero import Cut
from largescale.plan.fetching import Coordinator, Event, Parameter
from largescale.plan.module_calls import tell_calls
from largescale.plan.stand_in import Peaks, StandIn
from largescale.plan.trace import WAITED, WEIGHTS, Collective, StepTrace
from largescale.processes import world_size

_LEARNING_STEPS = 2
_BYTES = 4
"""Of an element: the adapter keeps weights in fp32 in every precision that it permits."""

_DEFAULTS = {
    "param_persistence_threshold": 100_000,
    "prefetch_bucket_size": 50_000_000,
    "max_reuse_distance": 1_000_000_000,
    "max_live_parameters": 1_000_000_000,
}
"""DeepSpeed's, of the options that the adapter leaves alone; elements."""


class Zero3(StandIn):
    """In the place of DeepSpeed's engine and of its sharded optimizer; names that the adapter reads are DeepSpeed's.

    Args:
        method: with whole weights.
        inner: the optimizer of its parameters.
        accumulate: micro-batches per step.
        settings: `zero_optimization` of DeepSpeed's configuration.
    """

    def __init__(self, method: Method, inner: torch.optim.Optimizer, accumulate: int, settings: dict[str, Any]) -> None:
        super().__init__(method)
        self.optimizer, self.inner, self.accumulate = self, inner, accumulate
        self.settings = {name: settings.get(f"stage3_{name}", default) for name, default in _DEFAULTS.items()}
        self.fp16_groups = [list(group["params"]) for group in inner.param_groups]
        sizes = [sum(_piece(p) for p in group) for group in self.fp16_groups]
        self.pieces = [torch.empty(size) for size in sizes]
        self.frozen_pieces = [torch.empty(_piece(p)) for p in method.parameters() if not p.requires_grad]
        self.fp32_partitioned_groups_flat = [nn.Parameter(torch.empty(size)) for size in sizes]
        self.bucket, self._filled = torch.empty(settings["reduce_bucket_size"]), 0
        self.gradient_pieces = torch.empty(sum(sizes))
        self.averaged_gradients = self._views()
        self._piece_of = {
            parameter: piece
            for number, group in enumerate(self.fp16_groups)
            for parameter, piece in zip(group, self.averaged_gradients[number], strict=True)
        }
        self._waiting: list[Tensor] = []
        self._events: list[Event] = []
        self._micro = 0
        for group, flat in zip(inner.param_groups, self.fp32_partitioned_groups_flat, strict=True):
            group["params"] = [flat]
        for parameter, piece in self._pieces_of_parameters(method):
            _describe(cast(Cut, parameter), piece)
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        tell_calls(method, self._tell)

    def forward(self, *arguments: object) -> Any:
        """The output of the method itself."""
        self._tell("begin")
        return super().forward(*arguments)

    def weights(self) -> list[Tensor]:
        """Pieces, flat fp32 copies of those that are updated, and small parameters, which stay whole."""
        small = [p for p in self.method.parameters() if self._stays(p)]
        return [*self.pieces, *self.frozen_pieces, *self.fp32_partitioned_groups_flat, *small]

    def always_held(self) -> list[Tensor]:
        """These, the bucket, and the pieces of gradients."""
        return [*self.weights(), self.bucket, self.gradient_pieces]

    def copies(self, parameter: Tensor) -> list[Tensor]:
        """The piece of a parameter, and all of it if it is small."""
        return [cast(Cut, parameter).ds_tensor, *([parameter.detach()] if self._stays(parameter) else [])]

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this is the last micro-batch of a step."""
        return (self._micro + 1) % self.accumulate == 0

    def backward(self, loss: Tensor, scale_wrt_gas: bool = False) -> None:
        """Compute gradients. Collectives: one reduce-scatter per bucket, in every micro-batch."""
        self._tell("middle")
        loss.backward()
        self._reduce()
        self._tell("end")

    @torch.no_grad()
    def step(self) -> None:
        """Count a micro-batch, update after the last.

        Collectives: one all-reduce per group for a norm, and the optimizer's.
        """
        boundary = self.is_gradient_accumulation_boundary()
        self._micro += 1
        if not boundary:
            return
        self._tell("update")
        self._norms()
        groups = self.inner.param_groups
        for number, flat in enumerate(self.fp32_partitioned_groups_flat):
            flat.grad = torch.cat(self.averaged_gradients[number])
            flat.grad.mul_(1.0)  # DeepSpeed takes the loss scale out, which is 1
            self.inner.param_groups = [groups[number]]
            self.inner.step()
            flat.grad = None
            self.pieces[number].copy_(flat)
        self.inner.param_groups = groups

    def observe(self, trace: StepTrace) -> None:
        """Bytes between two events come from here."""
        self._trace = trace

    def settle(self, trace: StepTrace, peaks: Peaks) -> Peaks:
        """Add the gathers of a step, and what was gathered to what was held."""
        always = sum(p.nbytes for p in self.method.parameters())
        coordinator = self._coordinator()
        gathered = self._replay(coordinator)
        # Each event's `before` ends a stretch of time that began with the event before it.
        held = [event.before - always + size for event, size in zip(self._events[1:], gathered, strict=False)]
        kept = max(size for event, size in zip(self._events, gathered, strict=True) if event.what == "middle")
        return Peaks(peaks.kept + kept - gathered[-1], max(held), peaks.update - always)

    def _replay(self, coordinator: Coordinator) -> list[int]:
        """Follow the last of some equal steps; returns bytes of gathered parameters behind each event."""
        for _ in range(_LEARNING_STEPS):
            for event in self._events:
                coordinator.follow(event)
        coordinator.gathers.clear()
        gathered, before = [], 0
        for event in self._events:
            coordinator.follow(event)
            gathered.append(_BYTES * coordinator.elements())
            what = Collective("all-gather", world_size(), WAITED if event.what == "update" else WEIGHTS)
            new = coordinator.gathers[before:] if world_size() > 1 else []
            before = len(coordinator.gathers)
            self._trace.add(what, len(new), _BYTES * sum(new))
        return gathered

    def _coordinator(self) -> Coordinator:
        numbers = {parameter: number for number, parameter in enumerate(self.method.parameters())}
        sizes = [Parameter(p.numel(), _piece(p) * world_size(), self._stays(p)) for p in numbers]
        members = [[numbers[p] for p in module.parameters(recurse=False)] for module in self.method.modules()]
        return Coordinator(
            sizes,
            members,
            prefetch=self.settings["prefetch_bucket_size"],
            reuse=self.settings["max_reuse_distance"],
            live=self.settings["max_live_parameters"],
        )

    def _pieces_of_parameters(self, method: Method) -> Iterator[tuple[Tensor, Tensor]]:
        for flat, group in zip(self.pieces, self.fp16_groups, strict=True):
            yield from zip(group, flat.split([_piece(p) for p in group]), strict=True)
        yield from zip((p for p in method.parameters() if not p.requires_grad), self.frozen_pieces, strict=True)

    def _stays(self, parameter: Tensor) -> bool:
        return parameter.numel() <= self.settings["param_persistence_threshold"]

    def _tell(self, what: str, module: int = -1) -> None:
        self._events.append(Event(what, module, self._trace.lap()))

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        if self._filled + parameter.numel() > self.bucket.numel():
            self._reduce()
        assert parameter.grad is not None
        self.bucket.narrow(0, self._filled, parameter.numel()).copy_(parameter.grad.view(-1))
        parameter.grad = None
        self._waiting.append(parameter)
        self._filled += parameter.numel()

    @torch.no_grad()
    def _reduce(self) -> None:
        if not self._waiting:
            return
        sizes = [_piece(parameter) for parameter in self._waiting]
        flat, padding = self.bucket.narrow(0, 0, self._filled), sum(sizes) * world_size() - self._filled
        if len(sizes) > 1 or padding:
            flat = torch.cat([flat, torch.empty(padding)])
        flat.div_(world_size())
        own = flat.narrow(0, 0, sum(sizes))
        with exchanging(WEIGHTS):
            reduce_scatter(own, flat)
        for parameter, piece in zip(self._waiting, own.split(sizes), strict=True):
            mine = self._piece_of[parameter]
            mine.add_(piece) if self._micro % self.accumulate else mine.copy_(piece)
        self._waiting, self._filled = [], 0

    def _norms(self) -> None:
        """DeepSpeed's own norm of the gradient, which cannot be switched off in this stage."""
        for pieces in self.averaged_gradients.values():
            square = torch.stack([piece.double().norm() for piece in pieces]).square().sum()
            with exchanging(WAITED):
                dist.all_reduce(square)

    def _views(self) -> dict[int, list[Tensor]]:
        views = iter(self.gradient_pieces.split([_piece(p) for group in self.fp16_groups for p in group]))
        return {number: [next(views) for _ in group] for number, group in enumerate(self.fp16_groups)}


def _piece(parameter: Tensor) -> int:
    return math.ceil(parameter.numel() / world_size())


def _describe(parameter: Cut, piece: Tensor) -> None:
    """What the adapter asks DeepSpeed's parameters for."""
    size = _piece(parameter)
    parameter.ds_tensor = piece
    parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
    parameter.partition_numel = lambda: size
