"""DeepSpeed's ZeRO stages 1 and 2 (0.19), as `largescale.parallel.zero` configures them.

The weights of a parameter group lie in one flat tensor, padded to a multiple of twice the ranks; each rank has its even
stretch of it once more, which it updates. Gradients are copied into a bucket; a full bucket is summed over the ranks by
one all-reduce. Stage 2 does so during the backward pass of every micro-batch and keeps what lies in the rank's stretch;
stage 1 after the last one, group by group. Neither overlaps with anything. The gradients that a rank keeps are those of
all parameters that begin in its stretch: one that reaches out of it is kept whole.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largescale.distributed.collectives import exchanging
from largescale.methods.method import Method
from largescale.plan.stand_in import StandIn, all_gather, in_one_piece
from largescale.plan.trace import WAITED
from largescale.processes import world_size


class Zero12(StandIn):
    """In the place of DeepSpeed's engine and of its sharded optimizer; names that the adapter reads are DeepSpeed's.

    Args:
        method: with whole weights.
        inner: the optimizer of its parameters.
        stage: 1 or 2.
        accumulate: micro-batches per step.
        settings: `zero_optimization` of DeepSpeed's configuration.
    """

    def __init__(
        self, method: Method, inner: torch.optim.Optimizer, stage: int, accumulate: int, settings: dict[str, Any]
    ) -> None:
        super().__init__(method)
        self.optimizer, self.inner, self.stage, self.accumulate = self, inner, stage, accumulate
        self.bucket_size = settings["reduce_bucket_size"]
        self.bit16_groups = [list(group["params"]) for group in inner.param_groups]
        self.flats = [_flat(group) for group in self.bit16_groups]
        self.stretches = [flat.narrow(0, 0, flat.numel() // world_size()) for flat in self.flats]
        self.single_partition_of_fp32_groups = [nn.Parameter(stretch.clone()) for stretch in self.stretches]
        self.own = [
            _place(group, stretch.numel()) for group, stretch in zip(self.bit16_groups, self.stretches, strict=True)
        ]
        self.averaged_gradients: dict[int, list[Tensor]] = {}
        self._accumulated: list[list[Tensor]] | None = None
        self._bucket: Tensor | None = None
        self._kept: Tensor | None = None
        self._micro, self._filled, self._num_kept = 0, 0, 0
        self._waiting: list[Tensor] = []
        for group, partition in zip(inner.param_groups, self.single_partition_of_fp32_groups, strict=True):
            group["params"] = [partition]
        self.frozen = [parameter for parameter in method.parameters() if not parameter.requires_grad]
        for parameter in (p for p in method.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def weights(self) -> list[Tensor]:
        """Flat weights, padding included, the stretches that are updated, and what is not trained."""
        return [*self.flats, *self.single_partition_of_fp32_groups, *self.frozen]

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this is the last micro-batch of a step."""
        return (self._micro + 1) % self.accumulate == 0

    def backward(self, loss: Tensor, scale_wrt_gas: bool = False) -> None:
        """Compute gradients. Collectives: one all-reduce per bucket; in stage 1 only in the last micro-batch."""
        loss.backward()
        with torch.no_grad():
            if self.stage == 1 and self.is_gradient_accumulation_boundary():
                for group in self.bit16_groups:
                    for parameter in group:
                        if parameter.grad is not None:  # else another objective of the step moves it
                            self._collect(parameter)
            if self.stage == 2 or self.is_gradient_accumulation_boundary():
                self._finish_backward()

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        if self._bucket is None:
            self._bucket = torch.empty(self.bucket_size, dtype=parameter.dtype)
        if self.stage == 2:
            self._collect(parameter)

    def _collect(self, parameter: Tensor) -> None:
        if self._filled + parameter.numel() > self.bucket_size:
            self._reduce()
        assert self._bucket is not None and parameter.grad is not None
        place = self._bucket.narrow(0, self._filled, parameter.numel())
        place.copy_(parameter.grad.view(-1))
        parameter.grad = place.view_as(parameter)
        self._waiting.append(parameter)
        self._filled += parameter.numel()

    def _reduce(self) -> None:
        if self._waiting:
            assert self._bucket is not None
            summed = self._bucket.narrow(0, 0, self._filled).div_(world_size()).clone()
            with exchanging(WAITED):
                dist.all_reduce(summed)
        own = {id(parameter) for group in self.own for parameter in group}
        for parameter in self._waiting:
            if id(parameter) in own:
                self._keep(parameter)
            elif self.stage == 2:
                parameter.grad = None
        self._waiting, self._filled = [], 0

    def _keep(self, parameter: Tensor) -> None:
        if self._kept is None:
            self._kept = torch.empty(sum(p.numel() for group in self.own for p in group), dtype=parameter.dtype)
        assert parameter.grad is not None
        place = self._kept.narrow(0, self._num_kept, parameter.numel())
        place.copy_(parameter.grad.view(-1))
        parameter.grad = place.view_as(parameter)
        self._num_kept += parameter.numel()

    def _finish_backward(self) -> None:
        self._reduce()
        gradients = [[parameter.grad for parameter in group if parameter.grad is not None] for group in self.own]
        if self._accumulated is None:
            self._accumulated = gradients
        else:
            for sums, new in zip(self._accumulated, gradients, strict=True):
                for total, gradient in zip(sums, new, strict=True):
                    total.add_(gradient)
        if self.is_gradient_accumulation_boundary():
            for number, (sums, stretch) in enumerate(zip(self._accumulated, self.stretches, strict=True)):
                self.averaged_gradients[number] = _cut(sums, stretch)
            self._accumulated = None
        self._bucket, self._kept, self._num_kept = None, None, 0
        for parameter in self.method.parameters():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Count a micro-batch, update after the last. Collectives: the optimizer's, one all-gather per group."""
        boundary = self.is_gradient_accumulation_boundary()
        self._micro += 1
        if not boundary:
            return
        groups = self.inner.param_groups
        for number, partition in enumerate(self.single_partition_of_fp32_groups):
            partition.grad = torch.cat([gradient.reshape(-1) for gradient in self.averaged_gradients.pop(number)])
            self.inner.param_groups = [groups[number]]
            self.inner.step()
            partition.grad = None
            self.stretches[number].copy_(partition)
        self.inner.param_groups = groups
        with exchanging(WAITED):
            for flat, stretch in zip(self.flats, self.stretches, strict=True):
                all_gather(flat, stretch)


def _flat(parameters: list[Tensor]) -> Tensor:
    unit = 2 * world_size()
    return in_one_piece(parameters, -(-sum(p.numel() for p in parameters) // unit) * unit)


def _place(parameters: list[Any], numel: int) -> list[Tensor]:
    """Note on each parameter of a group where it lies in rank 0's stretch; returns those that lie in it."""
    own, start = [], 0
    for parameter in parameters:
        parameter._hp_mapping = None
        if start < numel:
            held = min(parameter.numel(), numel - start)
            here, there = SimpleNamespace(start=start, numel=held), SimpleNamespace(start=0, numel=held)
            parameter._hp_mapping = SimpleNamespace(hp_fragment_address=here, lp_fragment_address=there)
            own.append(parameter)
        start += parameter.numel()
    return own


def _cut(gradients: list[Tensor], stretch: Tensor) -> list[Tensor]:
    """Gradients of whole parameters, cut and padded to fill a stretch."""
    pieces, room = [], stretch.numel()
    for gradient in gradients:
        whole = gradient.numel() <= room
        pieces.append(gradient if whole else gradient.reshape(-1).narrow(0, 0, room))
        room -= pieces[-1].numel()
    return pieces if room == 0 else [*pieces, torch.zeros(room, dtype=stretch.dtype)]
