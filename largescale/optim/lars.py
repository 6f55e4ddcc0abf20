"""LARS: layer-wise adaptive rates (arXiv 1708.03888), exact when parameters are sharded.

The update is the one of SwAV's published recipe (LARC without clipping inside SGD): for each parameter w with
gradient g

    g <- (g + weight_decay * w) * trust * |w| / (|g| + weight_decay * |w| + eps)
    m <- momentum * m + g
    w <- w - lr * m

where a parameter of zeros takes its gradient unscaled, and one whose gradient is zero stays as it is. The published
code of SimCLR, BYOL, Barlow Twins and VICReg divides by |g + weight_decay * w| instead, the norm of the sum; there a
parameter whose sum is zero stays as it is.

The norms are those of whole parameters: each rank sums the squares of its pieces, one all-reduce adds them up for all
parameters, the rest is local. Pieces are the local parts of DTensors (FSDP2), or stretches of flat tensors (DeepSpeed's
ZeRO), which `flat_layouts` describes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from largescale.config.setting import setting
from largescale.distributed.collectives import exchanging
from largescale.optim import sgd

_ROW = 1024
SUM_OF_NORMS, NORM_OF_SUM = "sum_of_norms", "norm_of_sum"


@dataclass
class Settings(sgd.Settings):
    """Keys under `optim`: those of SGD with momentum, and how far a layer moves."""

    trust_coefficient: float = setting(
        0.001, "Length of an update relative to that of its weights, before the learning rate.", above=0, at_most=1e6
    )
    trust_denominator: str = setting(
        SUM_OF_NORMS,
        "What an update is divided by to get that length: `sum_of_norms` of gradient and weight decay, as in LARS's "
        "paper, or `norm_of_sum`, as in most published recipes of joint-embedding methods (docs/methods.md).",
        one_of=(SUM_OF_NORMS, NORM_OF_SUM),
    )


def options(settings: Settings) -> dict[str, Any]:
    """What the optimizer is built with."""
    return {
        "momentum": settings.momentum,
        "trust_coefficient": settings.trust_coefficient,
        "trust_denominator": settings.trust_denominator,
    }


class Fragment(NamedTuple):
    """A stretch of a flat tensor that holds a stretch of a parameter.

    Attributes:
        parameter: position in `FlatLayout.shapes`.
        offset: first element in the flat tensor.
        start: first element in the flattened parameter.
        numel: number of elements.
    """

    parameter: int
    offset: int
    start: int
    numel: int


class FlatLayout(NamedTuple):
    """What a rank's flat tensor is made of.

    Attributes:
        shapes: of the parameters that all ranks' flat tensors together hold, the same list on every rank.
        fragments: those in this rank's tensor; elements in none of them are padding.
    """

    shapes: list[torch.Size]
    fragments: list[Fragment]


class LARS(Optimizer):
    """SGD with momentum whose gradients are scaled by each parameter's trust ratio.

    Args:
        params: parameters or groups; a group with `scaled=False` is plain SGD (biases, normalisation).
        lr, momentum, weight_decay: as in SGD.
        trust_coefficient: the ratio's factor.
        trust_denominator: `sum_of_norms` or `norm_of_sum`.
        eps: added to a sum of norms.

    Attributes:
        flat_layouts: layouts of the parameters that are flat tensors; their norms are summed over `flat_group`.

    Collectives of `step`: none for whole parameters; for sharded ones one all-reduce of 2 numbers per parameter over
    the ranks that share them, which all of them must reach.
    """

    flat_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        trust_denominator: str = SUM_OF_NORMS,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "trust_denominator": trust_denominator,
            "eps": eps,
            "scaled": True,
        }
        super().__init__(params, defaults)
        self.flat_layouts: dict[Tensor, FlatLayout] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: a step has one backward
        """One update of all parameters that have a gradient."""
        if closure is not None:
            raise ValueError("LARS.step takes no closure")
        groups = [(group, self._pieces(group)) for group in self.param_groups]
        # New tensors, since gradients must survive the step for callers that look at them afterwards.
        sums = [_with_decay(pieces, group["weight_decay"]) for group, pieces in groups]
        whole_norms = iter(
            self._whole_norms(
                [
                    pieces if group["trust_denominator"] == SUM_OF_NORMS else pieces._replace(grads=updates)
                    for (group, pieces), updates in zip(groups, sums, strict=True)
                    if group["scaled"]
                ]
            )
        )
        for (group, pieces), updates in zip(groups, sums, strict=True):
            ratios = _trust_ratios(*next(whole_norms), group) if group["scaled"] else None
            if not updates:
                continue
            if ratios is not None:
                torch._foreach_mul_(updates, [ratios[slot].to(updates[0].dtype) for slot in pieces.slots])
            torch._foreach_mul_(pieces.momenta, group["momentum"])
            torch._foreach_add_(pieces.momenta, updates)
            torch._foreach_add_(pieces.weights, pieces.momenta, alpha=-group["lr"])

    def _pieces(self, group: dict[str, Any]) -> _Pieces:
        """What this rank holds of a group's parameters that have a gradient."""
        pieces = _Pieces([], [], [], [], [], 0)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            pieces.parameters.append(parameter)
            tensors = [local_piece(parameter), local_piece(parameter.grad), local_piece(self._momentum(parameter))]
            layout = self.flat_layouts.get(parameter)
            if layout is None:
                pieces.add(pieces.num_slots, *tensors)
            else:
                for fragment in layout.fragments:
                    stretch = [tensor.narrow(0, fragment.offset, fragment.numel) for tensor in tensors]
                    pieces.add(pieces.num_slots + fragment.parameter, *stretch)
            pieces = pieces._replace(num_slots=pieces.num_slots + (1 if layout is None else len(layout.shapes)))
        return pieces

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _whole_norms(self, groups: list[_Pieces]) -> list[tuple[Tensor, Tensor]]:
        """Norms of the whole parameters of each group, and of what is in place of their gradients: two vectors each."""
        tensors = [t for pieces in groups for t in pieces.weights] + [t for pieces in groups for t in pieces.grads]
        parameters = [parameter for pieces in groups for parameter in pieces.parameters]
        sizes = [pieces.num_slots for pieces in groups]
        if not parameters:
            return [(torch.empty(0), torch.empty(0)) for _ in groups]
        if any(parameter in self.flat_layouts for parameter in parameters):
            held = norms(tensors).square().view(2, -1) if tensors else None
            squares = self._spread(held, groups, parameters[0].device)
            _sum_over(squares, self.flat_group)
        else:
            squares = norms(tensors).square().view(2, -1)
            if (shards := shard_group(parameters)) is not None:
                _sum_over(squares, shards)
        weight_norms, grad_norms = squares.sqrt()
        return list(zip(weight_norms.split(sizes), grad_norms.split(sizes), strict=True))

    def _spread(self, squares: Tensor | None, groups: list[_Pieces], device: torch.device) -> Tensor:
        """Put the squares of this rank's fragments into the slots of their parameters; other ranks hold the rest."""
        # Always float64: a rank without any fragment has no dtype of its own, and all must send the same.
        spread = torch.zeros(2, sum(pieces.num_slots for pieces in groups), dtype=torch.float64, device=device)
        places, first = [], 0
        for pieces in groups:
            places += [first + slot for slot in pieces.slots]
            first += pieces.num_slots
        if squares is not None:
            spread[:, places] = squares.double()
        return spread


def _sum_over(squares: Tensor, group: dist.ProcessGroup | None) -> None:
    with exchanging("norms of LARS"):
        dist.all_reduce(squares, group=group)


class _Pieces(NamedTuple):
    """Local pieces of a group; `slots` says which of its `num_slots` whole parameters each belongs to."""

    parameters: list[Tensor]
    slots: list[int]
    weights: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    num_slots: int

    def add(self, slot: int, weight: Tensor, grad: Tensor, momentum: Tensor) -> None:
        # One entry in each of the fields `slots` to `momenta`: `step` relies on equal positions being the same piece.
        self.slots.append(slot)
        self.weights.append(weight)
        self.grads.append(grad)
        self.momenta.append(momentum)


def _with_decay(pieces: _Pieces, weight_decay: float) -> list[Tensor]:
    """Gradients plus decay, in new tensors."""
    return list(torch._foreach_add(pieces.grads, pieces.weights, alpha=weight_decay)) if pieces.grads else []


def _trust_ratios(weight_norms: Tensor, other_norms: Tensor, group: dict[str, Any]) -> Tensor:
    """What updates are scaled by, given the other norms, of the gradients, or of their sums with the decay."""
    denominators = other_norms
    if group["trust_denominator"] == SUM_OF_NORMS:
        denominators = other_norms + group["weight_decay"] * weight_norms + group["eps"]
    ratios = group["trust_coefficient"] * weight_norms / denominators
    # Branches on the device: looking at the norms would stall it.
    ratios = torch.where(weight_norms > 0, ratios, torch.ones_like(ratios))
    return torch.where(other_norms > 0, ratios, torch.zeros_like(ratios))


def norms(tensors: list[Tensor]) -> Tensor:
    """Norms of tensors, one vector. In float64 on CPUs, whose float32 sums are off by 1e-4 for large tensors."""
    on_cpu = tensors[0].device.type == "cpu"
    if not on_cpu or is_fake(tensors[0]):  # fake ones stand for a GPU's, in a plan
        return torch.stack(torch._foreach_norm(tensors, 2, torch.float64 if on_cpu else None))
    short = [one for one in tensors if one.numel() <= _ROW]
    found = iter(torch._foreach_norm(short, 2, torch.float64)) if short else iter(())
    return torch.stack([next(found) if one.numel() <= _ROW else _norm_in_rows(one) for one in tensors])


def _norm_in_rows(tensor: Tensor) -> Tensor:
    """Short rows in the tensor's precision, their sum in float64: as exact as float64, at a tenth of the time."""
    flat = as_stored(tensor)
    rows, rest = flat.split([flat.numel() // _ROW * _ROW, flat.numel() % _ROW])
    lengths = [torch.linalg.vector_norm(part.view(-1, width), dim=1) for part, width in ((rows, _ROW), (rest, 1))]
    return torch.cat(lengths).double().square().sum().sqrt()


def as_stored(tensor: Tensor) -> Tensor:
    """All numbers of a tensor [...] as [N], for sums in any order: as they lie in memory, where that is possible."""
    dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.as_strided((tensor.numel(),), (1,)) if dense else tensor.flatten()


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


def local_piece(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
