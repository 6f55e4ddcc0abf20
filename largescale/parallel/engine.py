"""What the training loop sees of a parallel strategy: forward and backward, check, update, state.

`Engine` is complete for strategies whose gradients end up in `parameter.grad` (whole or as DTensors); one that keeps
them elsewhere overrides the methods under "What a strategy may do differently".
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from largescale.config import Config
from largescale.data.views import Views
from largescale.distributed.collectives import sum_over_ranks
from largescale.methods.embedding_method import Embedded
from largescale.methods.method import Method, Output
from largescale.models.unit_rows import normalize_rows_
from largescale.optim.lars import as_stored, local_piece, norms, shard_group
from largescale.optim.roles import MAIN, moved_by_others, parameters_with, set_rates
from largescale.parallel.batchnorm import average_statistics, differ_by_rank, enough_rows
from largescale.parallel.clipping import GradientPieces, clip_each
from largescale.parallel.masks import own_piece
from largescale.parallel.precision import LossScale, views_dtype
from largescale.processes import rank, world_size

_LOOKED_AT = ("input views", "loss", "gradient")


@dataclass(frozen=True)
class StepCheck:
    """What all ranks know after the backward pass and before the update.

    Attributes:
        loss: mean over all ranks.
        grad_norm: global norm of the whole gradient; 0 if it overflowed.
        trouble: empty, or which ranks hold non-finite values, and in which gradients.
        stop: a rank wants to stop after this step.
        overflow: an fp16 gradient overflowed, as happens while the loss scale adapts; `update` skips it.
        norms: of the gradients of a step's earlier objectives, by name, where it has several.
    """

    loss: float
    grad_norm: float
    trouble: str
    stop: bool = False
    overflow: bool = False
    norms: dict[str, float] = field(default_factory=dict)


class Engine:
    """A method wrapped by a strategy, with its optimizer.

    Args:
        wrapped: the module to call.
        method: the method inside it; its parameters and buffers have the canonical names.
        optimizer: over the method's (possibly sharded) parameters.
        config: the run's configuration.
        device: of this rank.
        autocast_dtype: precision of the forward pass where the strategy does not cast parameters itself.
    """

    def __init__(
        self,
        *,
        wrapped: nn.Module,
        method: Method,
        optimizer: Optimizer,
        config: Config,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.wrapped, self.method, self.optimizer, self._config = wrapped, method, optimizer, config
        self.accumulate, self.autocast_dtype = config.train.accumulate, autocast_dtype
        self._loss_over_batch = config.train.loss_spans == "global_batch" and self.accumulate > 1
        self._views_dtype = views_dtype(config)
        self._peak_lr, self._clip_tensors = config.optim.lr, config.optim.clip_tensor_norm
        self._unit_rows = parameters_with(method, method.roles(), "unit_rows")
        self.objective = MAIN
        self._others = moved_by_others(method, method.roles(), method.objectives)
        self._views_per_group = [group.num for group in config.data.crops]
        self._kept: list[tuple[Tensor, Tensor]] = []
        self.loss_scale = LossScale(config.train.precision == "fp16", device)
        self.all_ranks: DeviceMesh = init_device_mesh(device.type, (world_size(),))

    def forward_backward(self, views: Views, step: int, objective: str = MAIN) -> Output:
        """Loss and averaged gradients of the local batch, one micro-batch after the other.

        Args:
            objective: one of `Method.objectives`; `check` and `update` that follow are for it.

        Returns:
            The loss and the signs of the local batch, and the evidence of all micro-batches.

        Collectives: the method's in each micro-batch, or once where its loss spans all of them; the strategy's, its
        gradients' in the last one alone where it can hold them back. Every rank must call it.
        """
        if self._loss_over_batch:
            return self._forward_backward_over_batch(views, step)
        self.objective = objective
        which = [objective] if self._others else []
        outputs = []
        for number, micro_views in enumerate(self.micro_batches(views)):
            with self.gradient_sync(last=number == self.accumulate - 1):
                output = self._call(micro_views, step, *which)
                self.backward(output.loss * self.loss_scale.factor / self.accumulate)
            outputs.append(output._replace(loss=output.loss.detach()))
        for parameter in self._others.get(objective, ()):
            parameter.grad = None
        return self._together(outputs)

    def _forward_backward_over_batch(self, views: Views, step: int) -> Output:
        """The same with one loss over all micro-batches, each of which is embedded twice."""
        micro_batches = self.micro_batches(views)
        with torch.no_grad():
            inputs = [self._call(micro_views, step, "inputs") for micro_views in micro_batches]
            output, gradients = self._call(Embedded(inputs, views.ids), step, "loss")
        for number, micro_views in enumerate(micro_batches):
            with self.gradient_sync(last=number == self.accumulate - 1):
                embeddings = self._call(micro_views, step, "embed")
                self.backward(gradients.loss_at(embeddings, number, self.accumulate) * self.loss_scale.factor)
        return output

    @torch.no_grad()
    def embed(self, images: Tensor, step: int) -> Tensor:
        """What an offline phase wants to know of normalised images [B, 3, S, S]: `Method.plain`, [B, D].

        Collectives: those of the strategy's forward pass; every rank must call it, equally often.
        """
        images = images.to(self._views_dtype, memory_format=torch.channels_last)
        return self._call(images, step, "plain")

    def _call(self, *arguments: object) -> Any:
        """Call the method in its precision; every call casts the weights again, with or without a graph."""
        with self._autocast(), enough_rows(self._config):
            return self.wrapped(*arguments)

    def _together(self, outputs: list[Output]) -> Output:
        if len(outputs) == 1:
            return outputs[0]
        signs = {}
        for name in outputs[0].signs:
            values = torch.stack([output.signs[name] for output in outputs])
            signs[name] = values.any(0) if self.method.signs[name].over == "any" else values.mean(0)
        evidence = {
            f"{name}.{number}": value
            for number, output in enumerate(outputs)
            for name, value in output.evidence.items()
        }
        return Output(torch.stack([output.loss for output in outputs]).mean(), signs, evidence)

    def micro_batches(self, views: Views) -> list[Views]:
        """Cut the views of a step into those of its micro-batches, channels last in memory."""
        cut = [
            images.unflatten(0, (num, self.accumulate, -1))
            for num, images in zip(self._views_per_group, views.images, strict=True)
        ]
        ids = views.ids.view(self.accumulate, -1)
        facts = {name: values.unflatten(1, (self.accumulate, -1)) for name, values in views.facts.items()}
        supports = [None] * self.accumulate if views.supports is None else views.supports.cut(self.accumulate)
        sounds = [None] * self.accumulate if views.sounds is None else views.sounds.chunk(self.accumulate)
        return [
            Views(
                [images[:, number].flatten(0, 1).contiguous(memory_format=torch.channels_last) for images in cut],
                ids[number],
                {name: values[:, number] for name, values in facts.items()},
                supports[number],
                sounds[number],
            )
            for number in range(self.accumulate)
        ]

    @torch.no_grad()
    def check(self, views: Views, loss: Tensor, *, stop: bool = False) -> StepCheck:
        """Drop gradients of masked weights, and agree on loss, gradient norm, whether anything is not
        finite and whether to stop, in one exchange.

        Views and loss are checked before they mix with other ranks' values, so that the culprit can be named: after
        synchronised BatchNorm and a loss over all ranks, one rank's NaN is on every rank.

        Collectives: every rank must call it; one all-reduce of 3 + 3 * world_size numbers. Where gradients alone are
        not finite, one more of a number per parameter.
        """
        for gradient, kept in self.masked_gradients():
            gradient.mul_(kept)  # what is not finite stays so, and is found
        grads = self.gradients()
        if self.loss_scale.enabled and grads:
            torch._foreach_div_(grads, self.loss_scale.factor.to(grads[0]))
        squares = norms(grads).double().square() if grads else loss.new_zeros(1, dtype=torch.float64)
        grad_square = squares.sum().to(loss.device)  # gradients may lie in host memory
        views_sum = torch.stack([as_stored(images).sum(dtype=torch.float64) for images in views.pixels()]).sum()
        size = world_size()
        bad = torch.zeros(len(_LOOKED_AT), size, dtype=torch.float64, device=loss.device)
        bad[:, rank()] = torch.stack([views_sum, loss.double(), grad_square]).isfinite().logical_not().double()
        sums = sum_over_ranks(
            {
                "loss": loss.double() / size,
                "grad_square": grad_square / self.gradient_replicas(),
                # Written by a kernel; copied to the device, it would make the host wait for it.
                "stop": torch.full((), stop, dtype=torch.float64, device=loss.device),
                "bad": bad,
            }
        )
        mean_loss, square, stops = float(sums["loss"]), float(sums["grad_square"]), bool(sums["stop"] > 0)
        norm = math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan
        trouble = _describe_trouble(sums["bad"])
        if trouble and self.objective != MAIN:
            trouble = f"{self.objective}: {trouble}"
        if not math.isnan(norm) or bool(sums["bad"][:2].any()):
            return StepCheck(mean_loss, norm, trouble, stops)
        # Loss and views are finite, so it is the way back that failed.
        if self.loss_scale.enabled and self.loss_scale.can_shrink():
            return StepCheck(mean_loss, 0.0, "", stops, overflow=True)
        where = self._describe_bad_gradients(loss.device)
        if self.loss_scale.enabled:
            where += f", at the smallest loss scale of fp16, {LossScale.SMALLEST:g}, so this overflow will not pass"
        return StepCheck(mean_loss, norm, trouble + where, stops)

    def update(self, check: StepCheck, *, step: int, lr: float, clip: float) -> None:
        """Clip, update the parameters, drop the gradients. Collectives: the optimizer's."""
        if self.loss_scale.enabled:
            self.loss_scale.step(check.overflow)
            if check.overflow:
                self.optimizer.zero_grad(set_to_none=True)
                return
        if clip > 0 and check.grad_norm > clip and (gradients := self.gradients()):
            torch._foreach_mul_(gradients, clip / check.grad_norm)
        set_rates(self.optimizer.param_groups, step=step, lr=lr, peak=self._peak_lr, objective=self.objective)
        self.apply_gradients(step)

    def apply_gradients(self, step: int) -> None:
        """Clip gradients one by one, update the parameters; after the last objective of a step, the teachers and what
        else the method moves.

        Collectives: those of `clip_each`, if that is asked for; the optimizer's.
        """
        if self._clip_tensors > 0:
            clip_each(self.gradient_pieces(), self._clip_tensors, torch.device(self.all_ranks.device_type))
        self.step_optimizer()
        if self.objective != self.method.objectives_of(step)[-1]:
            return
        if self.method.averages():
            self.follow(self.method.average_momentum(step))
        self.method.after_update(step)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Let teachers follow their students: t <- momentum * t + (1 - momentum) * s.

        Collectives: one all-reduce where running statistics are followed and differ by rank, which teachers may not.
        """
        for average in self.method.averages():
            student, teacher = (self.method.get_submodule(name) for name in (average.student, average.teacher))
            pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
            mine = [piece for parameter, _ in pairs for piece in self.pieces(parameter)]
            theirs = [piece for _, parameter in pairs for piece in self.pieces(parameter)]
            if average.buffers:
                if differ_by_rank(student):
                    average_statistics(student)
                for own, other in zip(teacher.buffers(), student.buffers(), strict=True):
                    if own.is_floating_point():
                        mine.append(own)
                        theirs.append(other)
            torch._foreach_lerp_(mine, theirs, 1 - momentum)

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, by canonical name; sharded tensors as DTensors, nothing is gathered."""
        extra = self.method.state(self.all_ranks)
        if self.loss_scale.enabled:
            extra["loss_scale"] = self.loss_scale.numbers
        return {**self.model_state(), **self.optimizer_state(), **{f"extra.{k}": value for k, value in extra.items()}}

    def until_update(self, state: dict[str, Tensor]) -> set[str]:
        """Names of tensors that stay constant until `update`; the rest may change in a forward pass."""
        parameters = {f"model.{name}" for name, _ in self.method.named_parameters()}
        return {name for name in state if name in parameters or name.startswith("optimizer.")}

    # -- What a strategy may do differently -----------------------------------------------------------------------

    def mask(self, kept: dict[str, Tensor]) -> None:
        """Train only a part of some parameters from now on. Collectives: none.

        Args:
            kept: bool, whole and the same on all ranks, by names of parameters: true where a weight is trained. The
                others must be zero, and so must their optimizer state.
        """
        parameters = dict(self.method.named_parameters())
        self._kept = [(parameters[name], own_piece(whole, parameters[name])) for name, whole in kept.items()]

    def masked_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's pieces of gradients, to be changed in place, each with the same piece of its mask."""
        return [(local_piece(p.grad), kept) for p, kept in self._kept if p.grad is not None]

    def gradient_sync(self, last: bool) -> AbstractContextManager[object]:
        """Wrap a micro-batch: gradients are exchanged only after the last one of a step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients, averaged over ranks. Collectives: the strategy's; every rank must call it."""
        loss.backward()

    def pieces(self, parameter: Tensor) -> list[Tensor]:
        """This rank's pieces of a parameter, all copies of them, to be changed in place."""
        return [local_piece(parameter.detach())]

    def gradients(self) -> list[Tensor]:
        """This rank's pieces of the averaged gradient, to be read or scaled in place."""
        return [local_piece(p.grad) for p in self.method.parameters() if p.grad is not None]

    def gradient_pieces(self) -> GradientPieces:
        """The same by parameter."""
        parameters: list[Tensor] = list(self.method.parameters())
        numbers = [number for number, parameter in enumerate(parameters) if parameter.grad is not None]
        return GradientPieces(numbers, self.gradients(), len(parameters), shard_group(parameters))

    def gradient_replicas(self) -> int:
        """Ranks that hold the same piece of the gradient."""
        group = shard_group(list(self.method.parameters()))
        return world_size() if group is None else world_size() // dist.get_world_size(group)

    def step_optimizer(self) -> None:
        """Update the parameters, drop the gradients, bring rows to their length."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.normalize_rows()

    def normalize_rows(self) -> None:
        """Scale rows to length 1 for roles with `unit_rows`. Collectives: none."""
        if self.objective == MAIN:
            normalize_rows_(self._unit_rows)

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers as `model.NAME`."""
        return {f"model.{name}": value for name, value in self.method.state_dict().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """State of the optimizer as `optimizer.NAME.KEY`."""
        return {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.method.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def prepare_optimizer_state(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Make room for the optimizer state that a checkpoint holds (a fresh optimizer has none).

        Args:
            shapes: of all tensors in the checkpoint, by canonical name.
        """
        for name, parameter in self.method.named_parameters():
            for key in state_keys(name, shapes):
                shape = shapes[f"optimizer.{name}.{key}"]
                whole = shape == tuple(parameter.shape)
                # Fused AdamW counts its steps where the parameter is.
                value = torch.zeros_like(parameter.detach()) if whole else torch.zeros(shape, device=parameter.device)
                self.optimizer.state[parameter][key] = value

    def take_state(self, state: dict[str, Tensor]) -> None:
        """Use a state that a checkpoint was loaded into; here its tensors are already the ones in use."""

    def _describe_bad_gradients(self, device: torch.device) -> str:
        """Which parameters' gradients are not finite, on any rank. Collectives: one all-reduce of a number for each."""
        named = list(self.method.named_parameters())
        bad = torch.zeros(len(named), device=device)
        for place, (_, parameter) in enumerate(named):
            if parameter.grad is not None:
                bad[place] = local_piece(parameter.grad).isfinite().all().logical_not()
        dist.all_reduce(bad)
        # Bad values spread from the loss back to the first layer, so the last layer is nearest to their source.
        names = [name for (name, _), is_bad in zip(named, bad.tolist(), strict=True) if is_bad]
        return f" ({len(names)} of {len(named)} parameters, nearest to the loss {names[-1]})" if names else ""

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.all_ranks.device_type, self.autocast_dtype)


def state_keys(name: str, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Keys of the optimizer's state that a checkpoint holds for a parameter."""
    prefix = f"optimizer.{name}."
    return [key.removeprefix(prefix) for key in shapes if key.startswith(prefix) and "." not in key[len(prefix) :]]


def _describe_trouble(bad: Tensor) -> str:
    """Which ranks hold which non-finite values, from flags [what was checked, ranks]."""
    parts = []
    for what, flags in zip(_LOOKED_AT, bad.tolist(), strict=True):
        ranks = [str(number) for number, flag in enumerate(flags) if flag]
        if ranks:
            parts.append(f"{what} not finite on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}")
    return "; ".join(parts)
