"""DeepSpeed's ZeRO: stage 1 cuts the optimizer state over the ranks, 2 the gradients too, 3 the parameters too.

DeepSpeed gives the optimizer one flat fp32 tensor per parameter group, which holds this rank's stretches of the group's
parameters, and steps one group at a time. `_layouts` says which stretches; with it LARS sees whole-parameter norms,
rows are brought to length 1 where they are updated, and checkpoints are the same as every other strategy's. The
fragment maps that it reads are not DeepSpeed's public interface; the tests compare each stage with one process.

Source: arXiv 1910.02054.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from largescale.config import Config
from largescale.distributed.collectives import exchanging
from largescale.methods.method import Method
from largescale.optim.lars import LARS, FlatLayout, Fragment
from largescale.optim.optimizers import build_optimizer
from largescale.parallel.clipping import GradientPieces
from largescale.parallel.engine import Engine, state_keys
from largescale.parallel.masks import own_stretches
from largescale.parallel.offload import offloads
from largescale.parallel.precision import AUTOCAST
from largescale.processes import rank, world_size
from shards.ground.errors import InputError

PRECISIONS = ("fp32", "tf32", "bf16")
_BUCKET_ELEMENTS = 25_000_000
"""Gradients that DeepSpeed collects before it reduces them, where no single one is larger."""


class Cut(nn.Parameter):
    """For type checkers: what stage 3 adds to a parameter.

    Attributes:
        ds_numel, ds_shape: of the whole.
        ds_tensor: this rank's piece, padded to `partition_numel()` elements.
    """

    ds_numel: int
    ds_shape: torch.Size
    ds_tensor: Tensor
    partition_numel: Callable[[], int]


class ZeroEngine(Engine):
    """`wrapped` is DeepSpeed's engine, `zero` its sharded optimizer around ours."""

    wrapped: Any  # DeepSpeed has no types
    zero: Any

    def __init__(self, *, stage: int, offload: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.zero, self.stage, self.offload = self.wrapped.optimizer, stage, offload
        self.layouts = _layouts(self.zero, stage)
        self.parameters_of = {flat: params for flat, params in zip(self.layouts, self._groups(), strict=True)}
        groups = zip(self.layouts, self.optimizer.param_groups, strict=True)
        self._objectives = {flat: group["role"].objective for flat, group in groups}
        self.names = {id(parameter): name for name, parameter in self.method.named_parameters()}
        self._kept_stretches: dict[int, Tensor] = {}
        if isinstance(self.optimizer, LARS):
            self.optimizer.flat_layouts = self.layouts
        self.optimizer.register_step_post_hook(self._normalize_unit_rows)

    def backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss, scale_wrt_gas=False)
        if not self.wrapped.is_gradient_accumulation_boundary():
            self.wrapped.step()  # counts the micro-batch

    def gradients(self) -> list[Tensor]:
        if self.offload:
            return [flat.grad for flat in self.layouts if self._moves(flat) and flat.grad is not None]
        moved = [group for group, flat in enumerate(self.layouts) if self._moves(flat)]
        return [grad for group in moved for grad in self.zero.averaged_gradients[group]]

    def _moves(self, flat: Tensor) -> bool:
        return self._objectives[flat] == self.objective

    def gradient_pieces(self) -> GradientPieces:
        numbers, tensors, count = [], [], 0
        for group, (flat, layout) in enumerate(self.layouts.items()):
            if self.offload and self._moves(flat) and flat.grad is not None:
                held = [(fragment.parameter, _stretch(flat.grad, fragment)) for fragment in layout.fragments]
            elif not self.offload and self._moves(flat):
                held = _by_parameter(self.zero.averaged_gradients[group], layout, self.stage)
            else:
                held = []
            numbers += [count + number for number, _ in held]
            tensors += [tensor for _, tensor in held]
            count += len(layout.shapes)
        return GradientPieces(numbers, tensors, count, dist.group.WORLD)

    def gradient_replicas(self) -> int:
        return 1

    def mask(self, kept: dict[str, Tensor]) -> None:
        self._kept_stretches = own_stretches(kept, [name for _, _, name in self._places()], self.layouts)

    def masked_gradients(self) -> list[tuple[Tensor, Tensor]]:
        if not self._kept_stretches:
            return []
        held = self.gradient_pieces()
        return [
            (piece.view(-1)[: kept.numel()], kept)  # behind that is padding
            for number, piece in zip(held.numbers, held.tensors, strict=True)
            if (kept := self._kept_stretches.get(number)) is not None
        ]

    def pieces(self, parameter: Tensor) -> list[Tensor]:
        if self.stage < 3:
            return [parameter.detach()]
        cut = cast(Cut, parameter)
        gathered = cut.data.shape == cut.ds_shape  # small ones stay whole, beside their pieces
        return [cut.ds_tensor.detach(), *([cut.detach()] if gathered else [])]

    def step_optimizer(self) -> None:
        self.wrapped.step()

    def model_state(self) -> dict[str, Tensor]:
        trained = {name: self._sharded(flat, flat, number) for flat, number, name in self._places()}
        frozen = {name: self._frozen(parameter) for name, parameter in self._frozen_pieces()}
        return {f"model.{name}": value for name, value in {**self.method.state_dict(), **trained, **frozen}.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        state = {}
        for flat, number, name in self._places():
            for key, value in self.optimizer.state.get(flat, {}).items():
                whole = value.shape == flat.shape
                state[f"optimizer.{name}.{key}"] = self._sharded(flat, value, number) if whole else value.clone()
        return state

    def prepare_optimizer_state(self, shapes: dict[str, tuple[int, ...]]) -> None:
        for flat, number, name in self._places():
            for key in state_keys(name, shapes):
                shape = shapes[f"optimizer.{name}.{key}"]
                whole = shape == tuple(self.layouts[flat].shapes[number])
                value = torch.zeros_like(flat.detach()) if whole else torch.zeros(shape, device=flat.device)
                self.optimizer.state[flat].setdefault(key, value)

    @torch.no_grad()
    def take_state(self, state: dict[str, Tensor]) -> None:
        """Copy a loaded state into the flat tensors and the weights. Collectives: one all-gather per tensor."""
        for flat, number, name in self._places():
            self._copy_in(flat, state[f"model.{name}"], flat, number)
            for key, value in self.optimizer.state.get(flat, {}).items():
                loaded = state[f"optimizer.{name}.{key}"]
                if value.shape == flat.shape:
                    self._copy_in(value, loaded, flat, number)
                else:
                    value.copy_(loaded)
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for flat, number, name in self._places():
            parameter, layout = cast(Cut, self.parameters_of[flat][number]), self.layouts[flat]
            for fragment in layout.fragments:
                if fragment.parameter == number:
                    parameter.ds_tensor.view(-1)[: fragment.numel].copy_(_stretch(flat, fragment))
            self._take_if_gathered(parameter, state[f"model.{name}"])
        for name, parameter in self._frozen_pieces():
            start, held = _own_stretch(parameter)
            whole = _whole(state[f"model.{name}"]).view(-1)
            parameter.ds_tensor.view(-1)[:held].copy_(whole.narrow(0, start, held))
            self._take_if_gathered(parameter, state[f"model.{name}"])

    @staticmethod
    def _take_if_gathered(parameter: nn.Parameter, value: Tensor) -> None:
        """Small parameters stay whole on every rank, beside their pieces."""
        if parameter.data.shape == value.shape:
            parameter.data.copy_(_whole(value))

    def _groups(self) -> list[list[nn.Parameter]]:
        return self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups

    def _places(self) -> Iterator[tuple[Tensor, int, str]]:
        """Flat tensor, position in it, and name of every parameter; in the same order on all ranks."""
        for flat, parameters in self.parameters_of.items():
            for number, parameter in enumerate(parameters):
                yield flat, number, self.names[id(parameter)]

    def _frozen_pieces(self) -> list[tuple[str, Cut]]:
        """Parameters that are not trained, of which this rank holds a piece; in stages 1 and 2 they are whole."""
        if self.stage < 3:
            return []
        return [
            (name, cast(Cut, parameter))
            for name, parameter in self.method.named_parameters()
            if not parameter.requires_grad
        ]

    def _frozen(self, parameter: Cut) -> DTensor:
        """One of these as a DTensor cut along its first axis. Collectives: one all-reduce of the whole."""
        start, held = _own_stretch(parameter)
        whole = torch.zeros(parameter.ds_numel, dtype=parameter.dtype, device=self.all_ranks.device_type)
        whole.narrow(0, start, held).copy_(parameter.ds_tensor.view(-1)[:held])
        return self._cut(whole, parameter.ds_shape)

    def _sharded(self, flat: Tensor, values: Tensor, number: int) -> Tensor:
        """A parameter-shaped value that ranks hold in flat stretches, as a DTensor cut along its first axis.

        Collectives: one all-reduce of the whole; memory for one parameter at a time.
        """
        layout = self.layouts[flat]
        whole = torch.zeros(layout.shapes[number].numel(), dtype=values.dtype, device=self.all_ranks.device_type)
        for fragment in layout.fragments:
            if fragment.parameter == number:
                whole.narrow(0, fragment.start, fragment.numel).copy_(_stretch(values, fragment))
        return self._cut(whole, layout.shapes[number])

    def _cut(self, whole: Tensor, shape: torch.Size) -> DTensor:
        """Add up what ranks hold of a flat tensor that is 0 elsewhere, and keep this rank's share of the rows."""
        dist.all_reduce(whole)
        whole = whole.view(shape)
        chunks = whole.chunk(world_size())
        own = chunks[rank()].clone() if rank() < len(chunks) else whole[:0].clone()
        return DTensor.from_local(
            own, self.all_ranks, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _copy_in(self, values: Tensor, loaded: Tensor, flat: Tensor, number: int) -> None:
        whole = _whole(loaded).view(-1)
        for fragment in self.layouts[flat].fragments:
            if fragment.parameter == number:
                _stretch(values, fragment).copy_(whole.narrow(0, fragment.start, fragment.numel))

    @torch.no_grad()
    def _normalize_unit_rows(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Scale rows to length 1 in the flat tensor that was just updated, before DeepSpeed sends it.

        Collectives: one all-reduce of a number per row.
        """
        for group in optimizer.param_groups:
            if group["role"].unit_rows and not group["frozen"]:
                for flat in group["params"]:
                    _normalize_rows(flat, self.layouts[flat])


def _normalize_rows(flat: Tensor, layout: FlatLayout) -> None:
    first_rows = [0]
    for shape in layout.shapes:
        first_rows.append(first_rows[-1] + shape[0])
    squares = torch.zeros(first_rows[-1], dtype=flat.dtype, device=flat.device)
    rows = []
    for fragment in layout.fragments:
        width = layout.shapes[fragment.parameter][1]
        elements = torch.arange(fragment.start, fragment.start + fragment.numel, device=flat.device)
        rows.append(first_rows[fragment.parameter] + elements // width)
        squares.index_add_(0, rows[-1], _stretch(flat, fragment).square())
    with exchanging("lengths of rows"):
        dist.all_reduce(squares)
    lengths = squares.sqrt().clamp_min(1e-12)
    for fragment, own_rows in zip(layout.fragments, rows, strict=True):
        _stretch(flat, fragment).div_(lengths[own_rows])


def _whole(loaded: Tensor) -> Tensor:
    """A tensor of a loaded state in one piece. Collectives: one all-gather."""
    assert isinstance(loaded, DTensor)
    return loaded.full_tensor()


def _own_stretch(parameter: Cut) -> tuple[int, int]:
    """First element and number of elements that this rank holds of a parameter that stage 3 has cut."""
    start = min(rank() * parameter.partition_numel(), parameter.ds_numel)
    return start, min(parameter.partition_numel(), parameter.ds_numel - start)


def _by_parameter(gradients: list[Tensor], layout: FlatLayout, stage: int) -> list[tuple[int, Tensor]]:
    """This rank's gradients of a group, each with the number of its parameter.

    Stage 3 has one for every parameter, padded with zeros; before, one for every fragment, and maybe some of padding.
    """
    if stage == 3:
        return list(zip(range(len(layout.shapes)), gradients, strict=True))
    sizes = [fragment.numel for fragment in layout.fragments]
    held = [one for one in gradients if not getattr(one, "_zero_padding", False)][: len(sizes)]
    assert sizes == [one.numel() for one in held], "gradients do not lie as their parameters do"
    return list(zip([fragment.parameter for fragment in layout.fragments], held, strict=True))


def _stretch(flat: Tensor, fragment: Fragment) -> Tensor:
    return flat.detach().narrow(0, fragment.offset, fragment.numel)


def _layouts(zero: Any, stage: int) -> dict[Tensor, FlatLayout]:
    """What each flat tensor of this rank holds, in the order of the parameter groups."""
    if stage < 3:
        return {
            flat: FlatLayout(
                [p.shape for p in parameters],
                [
                    Fragment(
                        number,
                        p._hp_mapping.hp_fragment_address.start,
                        p._hp_mapping.lp_fragment_address.start,
                        p._hp_mapping.lp_fragment_address.numel,
                    )
                    for number, p in enumerate(parameters)
                    if p._hp_mapping is not None
                ],
            )
            for flat, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        }
    layouts = {}
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        fragments, offset = [], 0
        for number, parameter in enumerate(parameters):
            start, held = _own_stretch(parameter)
            if held > 0:
                fragments.append(Fragment(number, offset, start, held))
            offset += parameter.partition_numel()
        assert offset == flat.numel(), "DeepSpeed lays its partitions out in another way than this code knows"
        layouts[flat] = FlatLayout([p.ds_shape for p in parameters], fragments)
    return layouts


def build(method: Method, config: Config, device: torch.device, *, stage: int) -> Engine:
    """Hand a method to DeepSpeed. Collectives: every rank must call it.

    Raises:
        InputError: DeepSpeed is not installed, or cannot train in this precision.
    """
    if config.train.precision not in PRECISIONS:
        raise InputError(
            f"train.precision={config.train.precision}: parallel.strategy=zero{stage} trains in fp32, tf32 or bf16"
        )
    deepspeed = _import_deepspeed(device)
    autocast_inside(method, config, device)
    optimizer = build_optimizer(method, method.roles(), config.optim)
    wrapped, *_ = deepspeed.initialize(
        model=method, optimizer=optimizer, config=deepspeed_config(config, stage, method), dist_init_required=False
    )
    return ZeroEngine(
        stage=stage,
        offload=offloads(config),
        wrapped=wrapped,
        method=method,
        optimizer=optimizer,
        config=config,
        device=device,
    )


def autocast_inside(method: Method, config: Config, device: torch.device) -> None:
    """Let the method's forward pass switch autocast on by itself: on CUDA, DeepSpeed's switches off what is on."""
    if (dtype := AUTOCAST.get(config.train.precision)) is not None:
        setattr(method, "forward", torch.autocast(device.type, dtype)(method.forward))  # noqa: B010


def deepspeed_config(config: Config, stage: int, method: Method) -> dict[str, Any]:
    """What DeepSpeed is told: precision, buckets and offloading of a stage."""
    sizes = [p.numel() for p in method.parameters()]
    # Its default of 5e8 elements would be held all the time by stage 3, as 2 GB.
    bucket = min(sum(sizes), max(_BUCKET_ELEMENTS, *sizes))
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    sharding: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    if stage == 3:
        sharding |= {"sub_group_size": 10**12}  # one optimizer step, and one exchange of norms, per parameter group
    elif not offloads(config):
        sharding |= {"compute_grad_norm": False}  # `Engine.check` has it
    if offloads(config):
        sharding |= {"offload_optimizer": offload}
        if stage == 3:
            sharding |= {"offload_param": offload}
    return {
        "train_batch_size": config.train.global_batch,
        "gradient_accumulation_steps": config.train.accumulate,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its default is 1.0; `Engine.update` clips
        "steps_per_print": 10**12,
    }


def _import_deepspeed(device: torch.device) -> Any:
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # it takes the device from there, though it is set
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise InputError("parallel.strategy=zero*: install DeepSpeed with `pip install deepspeed`") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer but its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # old names in its calls
    if device.type == "cpu":
        # None of its compiled operators is needed; it would compile one to join gloo's ranks.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
