"""What the training loop sees of a parallel strategy: forward, backward, check, update, state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from largescale.methods.swav import MethodOutput, SwAV
from largescale.optim.lars import shard_group
from largescale.processes import rank, world_size


@dataclass(frozen=True)
class StepCheck:
    """What all ranks know after the backward pass and before the update.

    Attributes:
        loss: mean over all ranks.
        grad_norm: global norm of the whole gradient.
        trouble: empty, or which ranks hold values that are not finite.
    """

    loss: float
    grad_norm: float
    trouble: str


class Engine:
    """A method wrapped by a strategy, with its optimizer.

    Args:
        wrapped: the module to call.
        method: the method inside it; its parameters and buffers have the canonical names.
        optimizer: over the method's (possibly sharded) parameters.
        mesh: one axis over all ranks; shards the method's extra state.
        autocast_dtype: precision of the forward pass where the strategy does not cast parameters itself.
    """

    def __init__(
        self,
        *,
        wrapped: nn.Module,
        method: SwAV,
        optimizer: Optimizer,
        mesh: DeviceMesh,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.wrapped, self.method, self.optimizer, self.mesh = wrapped, method, optimizer, mesh
        self._autocast_dtype = autocast_dtype

    def forward(self, views: Sequence[Tensor], step: int) -> MethodOutput:
        """Loss of the local batch. Collectives: the method's and the strategy's; every rank must call it."""
        self.method.before_step()
        channels_last = [view.contiguous(memory_format=torch.channels_last) for view in views]
        with self._autocast():
            return self.wrapped(channels_last, step)

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over ranks. Collectives: the strategy's; every rank must call it."""
        loss.backward()

    @torch.no_grad()
    def check(self, views: Sequence[Tensor], loss: Tensor) -> StepCheck:
        """Agree on loss, gradient norm and whether anything is not finite, in one exchange.

        Views and loss are looked at before they met other ranks' values, so that the culprit can be named: behind
        synchronised BatchNorm and Sinkhorn one rank's NaN is everybody's.

        Collectives: every rank must call it; one all-reduce of 2 + 3 * world_size numbers.
        """
        grads = [_local(p.grad) for p in self.method.parameters() if p.grad is not None]
        grad_square = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        views_sum = torch.stack([view.sum(dtype=torch.float64) for view in views]).sum()
        size = world_size()
        flags = torch.zeros(3, size, dtype=torch.float64, device=loss.device)
        flags[:, rank()] = torch.stack([views_sum, loss.double(), grad_square]).isfinite().logical_not().double()
        sums = torch.stack([loss.double() / size, grad_square / self._replicas()])
        message = torch.cat([sums, flags.flatten()])
        dist.all_reduce(message)
        numbers = message.tolist()
        return StepCheck(numbers[0], math.sqrt(max(0.0, numbers[1])) if math.isfinite(numbers[1]) else math.nan,
                         _describe_trouble(numbers[2:], size))

    def update(self, *, step: int, lr: float, clip: float, grad_norm: float) -> None:
        """Clip, update the parameters, drop the gradients. Collectives: the optimizer's."""
        if clip > 0 and grad_norm > clip:
            grads = [_local(p.grad) for p in self.method.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, clip / grad_norm)
        self.method.before_update(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, by canonical name; sharded tensors as DTensors, nothing is gathered."""
        state = {f"model.{name}": value for name, value in self.method.state_dict().items()}
        for name, parameter in self.method.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"optimizer.{name}.{key}"] = value
        extra = self.method.extra_state(self.mesh)
        return state | {f"extra.{name}": value for name, value in extra.items()}

    def prepare_optimizer_state(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Make room for the optimizer state that a checkpoint holds (a fresh optimizer has none).

        Args:
            shapes: of all tensors in the checkpoint, by canonical name.
        """
        for name, parameter in self.method.named_parameters():
            prefix = f"optimizer.{name}."
            for key in [key for key in shapes if key.startswith(prefix) and "." not in key[len(prefix) :]]:
                whole = shapes[key] == tuple(parameter.shape)
                value = torch.zeros_like(parameter.detach()) if whole else torch.zeros(shapes[key])
                self.optimizer.state[parameter][key.removeprefix(prefix)] = value

    def _replicas(self) -> int:
        """Ranks that hold the same piece of the gradient."""
        group = shard_group(list(self.method.parameters()))
        return world_size() if group is None else world_size() // dist.get_world_size(group)

    def _autocast(self) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.mesh.device_type, self._autocast_dtype)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _describe_trouble(flags: list[float], size: int) -> str:
    parts = []
    for place, what in enumerate(("input views", "loss", "gradient")):
        ranks = [str(r) for r in range(size) if flags[place * size + r]]
        if ranks:
            parts.append(f"{what} not finite on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}")
    return "; ".join(parts)
