"""LARS: layer-wise adaptive rates (arXiv 1708.03888), exact when parameters are sharded.

The update is the one of SwAV's published recipe (LARC without clipping inside SGD): for each parameter w with
gradient g

    g <- (g + weight_decay * w) * trust * |w| / (|g| + weight_decay * |w| + eps)
    m <- momentum * m + g
    w <- w - lr * m

where a parameter of zeros takes its gradient unscaled, and one whose gradient is zero stays as it is. The norms are
those of whole parameters: under FSDP2 each rank sums the squares of its pieces, one all-reduce adds them up for all
parameters, the rest is local.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum whose gradients are scaled by each parameter's trust ratio.

    Args:
        params: parameters or groups; a group with `scaled=False` is plain SGD (biases, normalisation).
        lr, momentum, weight_decay: as in SGD.
        trust_coefficient: the ratio's factor.
        eps: added to the denominator.

    Collectives of `step`: none for whole parameters; for sharded ones one all-reduce of 2 numbers a parameter over
    the ranks that share them, which all of them must reach.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                    "trust_coefficient": trust_coefficient, "eps": eps, "scaled": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("LARS.step takes no closure")
        scaled = [p for group in self.param_groups if group["scaled"] for p in group["params"] if p.grad is not None]
        norms = dict(zip(scaled, zip(*_whole_norms(scaled), strict=True), strict=True)) if scaled else {}
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            weights = [_local(p) for p in parameters]
            # New tensors: the gradients stay as they are, for whoever looks at them after the step.
            updates = torch._foreach_add([_local(p.grad) for p in parameters], weights, alpha=group["weight_decay"])
            if group["scaled"]:
                torch._foreach_mul_(updates, [_trust_ratio(*norms[p], group) for p in parameters])
            momenta = [_local(self._momentum(p)) for p in parameters]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(weights, momenta, alpha=-group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _trust_ratio(weight_norm: Tensor, grad_norm: Tensor, group: dict[str, Any]) -> Tensor:
    denominator = grad_norm + group["weight_decay"] * weight_norm + group["eps"]
    ratio = group["trust_coefficient"] * weight_norm / denominator
    # A branch on the device: looking at the norms would stall it once a parameter.
    ratio = torch.where(weight_norm > 0, ratio, torch.ones_like(ratio))
    return torch.where(grad_norm > 0, ratio, torch.zeros_like(ratio))


def _whole_norms(parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms of whole parameters and of their gradients, two vectors [P]."""
    pieces = [_local(p) for p in parameters] + [_local(p.grad) for p in parameters]
    squares = torch.stack(torch._foreach_norm(pieces)).square()
    group = shard_group(parameters)
    if group is not None:
        dist.all_reduce(squares, group=group)
    weight_norms, grad_norms = squares.sqrt().chunk(2)
    return weight_norms, grad_norms


def shard_group(parameters: list[Tensor]) -> dist.ProcessGroup | None:
    """The ranks that hold the pieces of sharded parameters; None for whole ones.

    Replicas (HSDP) are not in it: adding their equal sums would count them twice.
    """
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard):
                    return parameter.device_mesh.get_group(axis)
    return None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
