"""BatchNorm over the batch of all ranks, so that a run does not depend on the number of ranks.

torch's SyncBatchNorm refuses CPU tensors. `SyncBatchNorm` here works on any device and in float64; it is built from
the fused kernels of ordinary BatchNorm, so it costs little more than those. On CUDA torch's own is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.config import Config
from largescale.distributed.collectives import all_gather, exchanging
from largescale.processes import collective_timeout, world_size
from shards.ground.errors import InputError

STATISTICS = "BatchNorm's statistics"
"""Their name among exchanges."""

_ALONE = "Expected more than 1 value per channel"
"""How torch begins to say that a channel has a single value."""


class _SyncBatchNorm(torch.autograd.Function):
    """y = (x - mean) * invstd * weight + bias, with mean and variance over the rows of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var, count = _global_statistics(x, group)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count, ctx.group = eps, count, group
        ctx.mark_non_differentiable(mean, var)
        return torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, _mean_grad: Tensor, _var_grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of x, weight and bias. Collectives: one all-reduce over the group."""
        x, weight, mean, var = ctx.saved_tensors
        # The kernel of evaluation mode gives the local sums of grad and grad * x_hat together with grad * invstd *
        # weight; training mode differs by a correction that is linear in x, made from the sums of all ranks.
        not_saved = mean.new_empty(0)  # CUDA's kernel for channels last wants to be told; None aborts it
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(memory_format=_layout(x)),
            x,
            weight,
            mean,
            var,
            not_saved,
            not_saved,
            False,
            ctx.eps,
            [True, True, True],
        )
        sums = torch.cat([grad_weight, grad_bias])
        with exchanging(STATISTICS):
            dist.all_reduce(sums, group=ctx.group)
        sum_grad_xhat, sum_grad = sums.chunk(2)
        invstd = torch.rsqrt(var + ctx.eps)
        slope = -weight * invstd * invstd * sum_grad_xhat / ctx.count
        offset = -weight * invstd * sum_grad / ctx.count - slope * mean
        shape = (1, -1, *([1] * (x.dim() - 2)))
        correction = torch.addcmul(offset.view(shape), x, slope.view(shape))
        return grad_x.add_(correction), grad_weight, grad_bias, None, None


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _global_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all ranks, and the number of values in each.

    Local means and variances are merged as Chan et al. (1983) do, which keeps float32 accurate where the sums of
    squares would cancel.
    """
    stats_input = x if x.dtype in (torch.float32, torch.float64) else x.float()
    mean, var = torch.batch_norm_update_stats(stats_input, None, None, 0.0)
    count = x.numel() / x.shape[1]
    packed = torch.cat([mean, var, mean.new_tensor([count])])
    world_size = dist.get_world_size(group)
    gathered = packed.new_empty(world_size, packed.numel())
    with exchanging(STATISTICS):
        all_gather(gathered.view(-1), packed, group)
    channels = x.shape[1]
    means, variances, counts = gathered[:, :channels], gathered[:, channels:-1], gathered[:, -1:]
    total = counts.sum()
    global_mean = (means * counts).sum(0) / total
    global_var = ((variances + (means - global_mean).square()) * counts).sum(0) / total
    # Ranks hold equal pieces of the batch, so the count follows from shapes without reading from the device.
    return global_mean, global_var, count * world_size


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d/2d whose training statistics span a process group.

    Collectives: every rank of the group must call it in training mode; one all-gather of 2C + 1 numbers forward, one
    all-reduce of 2C numbers backward. None in evaluation mode or in a group of one. Local batches must be equal.
    """

    group: dist.ProcessGroup | None = None
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least [B, C], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] normalised; updates the running statistics in training mode."""
        if not self.training or dist.get_world_size(self.group) == 1:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps, self.group)
        with torch.no_grad():
            count = x.numel() / x.shape[1] * dist.get_world_size(self.group)
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.to(self.running_var.dtype) * (count / (count - 1)), self.momentum)
        return y


def synchronize_batchnorm(module: nn.Module, device: torch.device, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replace every BatchNorm of a module by a synchronised one, keeping parameters and buffers.

    Must be called on every rank before the module is wrapped.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batchnorm(child, device, group))
    return _synchronized(module, group) if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) else module


def _synchronized(norm: _BatchNorm, group: dist.ProcessGroup | None) -> SyncBatchNorm:
    replacement = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum)
    replacement.weight, replacement.bias = norm.weight, norm.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(replacement, name, getattr(norm, name))
    replacement.group = group
    return replacement.train(norm.training)  # a teacher may be in evaluation mode


@torch.no_grad()
def average_statistics(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make the running statistics equal on all ranks by averaging them.

    A checkpoint holds one copy; without this, unsynchronised BatchNorm would save those of an arbitrary rank. Those
    that are equal stay as they are, to the last bit.

    Collectives: every rank of the group must call it; one all-reduce.
    """
    buffers = [
        buffer
        for norm in module.modules()
        if isinstance(norm, _BatchNorm)
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    if not buffers or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])  # n equal numbers over n are that number then
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for buffer, averaged in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(averaged.view_as(buffer))


def differ_by_rank(module: nn.Module) -> bool:
    """Whether running statistics are of fewer than all ranks."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    return dist.get_world_size() > 1 and not all(_spans_all(norm) for norm in norms)


def _spans_all(norm: _BatchNorm) -> bool:
    if isinstance(norm, SyncBatchNorm):
        return norm.group is None
    return isinstance(norm, nn.SyncBatchNorm) and norm.process_group is None


def batchnorm_group(config: Config) -> dist.ProcessGroup | None:
    """The neighbouring ranks whose batch statistics this rank shares; None for all, even if there are fewer.

    Raises:
        InputError: the size does not divide the ranks.

    Collectives: every rank must call it; it makes groups.
    """
    size, ranks = config.parallel.batchnorm_group_size, world_size()
    if size == 0 or size >= ranks:
        return None
    if size < 0 or ranks % size:
        offers = [
            f"{divisor} ({batchnorm_images(config, divisor, ranks):g} images)"
            for divisor in range(1, ranks)
            if ranks % divisor == 0
        ]
        raise InputError(
            f"parallel.batchnorm_group_size={size}: does not divide {ranks} ranks; choose {', '.join(offers)} or 0 "
            f"({batchnorm_images(config, 0, ranks):g} images), a divisor or all ranks"
        )
    return dist.new_subgroups(size, timeout=collective_timeout(config.run.hang_timeout_s))[0]


@contextmanager
def enough_rows(config: Config) -> Iterator[None]:
    """Says what to set where a single image is all that BatchNorm in a head has, of which there are no statistics.

    Raises:
        InputError: that, in place of torch's ValueError.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(_ALONE):
            raise
        batch, accumulate, ranks = config.train.global_batch, config.train.accumulate, world_size()
        alone = ranks > 1 and not config.parallel.sync_batchnorm
        raise InputError(
            f"train.global_batch={batch}, train.accumulate={accumulate} on {ranks} rank{'s' * (ranks > 1)}: BatchNorm "
            f"has no statistics of a single image; {'start fewer ranks; for a new run, ' * alone}raise "
            f"train.global_batch or lower train.accumulate{', or set parallel.sync_batchnorm=true' * alone}"
        ) from error


def batchnorm_images(config: Config, size: int, ranks: int) -> float:
    """Images whose views share batch statistics, with groups of `size` out of `ranks` ranks (0: all of them)."""
    images = config.train.global_batch / config.train.accumulate
    return images if size == 0 or size >= ranks else images / ranks * size
