"""Steps under every strategy of one rank, in every precision, against the same steps on the CPU in float64.

Compared are the loss of each step and what the steps have changed in the weights, as a share of the change itself:
weights hardly move in a few steps, so errors relative to them would say nothing. Networks begin with small residual
branches; at their usual start round-off is multiplied by up to 1000 per step. They have no kinks either: where the
last bit decides whether a ReLU is on, or which pixel a pool takes, another number of threads changes a gradient by
percents. Layers of which that is true are compared by themselves, see `gpu.numerics`.
"""

from __future__ import annotations

import gc
import math
import tempfile
import traceback
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from gpu.harness import NEEDS_GPU, NOT_INSTALLED, OK, Context, Report
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from largescale.config import Config, load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.parallel import precision
from largescale.parallel.strategies import build_engine
from largescale.processes import process_group
from shards.ground.errors import InputError

PRECISIONS = ("fp32", "bf16", "fp16")
STEPS = 5

_DEMO = [
    "model={backbone: resnet, stem: 3x3s2, depths: [1, 1, 1, 1], width: 32}",
    "method={hidden: [256], embedding: 64, prototypes: 100}",
    "data.crops=[{num: 2, size: 28}, {num: 1, size: 24}]",
    "optim.name=sgd",
    "optim.lr=0.2",
    "optim.weight_decay=1e-4",
]
_RESNET = ["model.stem=imagenet", "optim.name=lars", "optim.lr=0.3", "optim.trust_coefficient=0.02"]
NETWORKS = {
    False: {
        "demo": [*_DEMO, "train.global_batch=64"],
        "ResNet-50 mini": [
            *_RESNET,
            "model.backbone=resnet50",
            "method.hidden=[512]",
            "method.prototypes=300",
            "data.crops=[{num: 2, size: 64}, {num: 1, size: 48}]",
            "train.global_batch=8",
        ],
    },
    True: {
        "demo": [*_DEMO, "model.width=8", "train.global_batch=16"],
        "ResNet-50 mini": [
            *_RESNET,
            "model={backbone: resnet, block: bottleneck, depths: [1, 1, 1, 1], width: 8}",
            "method={hidden: [32], embedding: 16, prototypes: 30}",
            "data.crops=[{num: 2, size: 48}, {num: 2, size: 32}]",
            "train.global_batch=8",
        ],
    },
}
"""By whether sizes are small: the demo's network, and bottleneck blocks behind the stem with pooling, under LARS."""

BOUNDS = {"fp32": (1e-5, 1e-4, 1e-3), "bf16": (2e-2, 0.25, 0.4), "fp16": (3e-3, 0.03, 0.1)}
"""Relative errors allowed: of the first loss, of the change of the weights in one step, and in five.

Half precision rounds each of some hundred values on the way through the network, views and weights included, to one
part in 2^9 (bf16), 2^12 (fp16) or 2^25 (fp32). Roundings add up like a random walk: ten times that in a loss, which is
an average over the batch. A gradient passes the network twice and is a difference of numbers that nearly cancel behind
BatchNorm and Sinkhorn (epsilon 0.05 multiplies an error of the scores by 20): a hundred times that. Steps multiply the
error again. What is meant to be caught is far larger: a wrong scale, layout, average or a missing gradient is 100%.
"""


def configuration(context: Context, network: str, *overrides: str) -> Config:
    """The recipe of a network."""
    return recipe([*NETWORKS[context.small][network], *overrides])


def recipe(overrides: list[str]) -> Config:
    """A configuration without shards, from nothing but overrides."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write("name: check\ndata: {shards: unset, streams: 1}\n")
        file.flush()
        return load_config(file.name, overrides)


def random_views(config: Config, step: int, device: torch.device, dtype: torch.dtype) -> Views:
    """Views of random images, channels last; the same for all devices and precisions."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = [
        torch.randn(
            group.num * config.train.global_batch, 3, group.size, group.size, generator=generator, dtype=torch.float64
        ).to(device, dtype, memory_format=torch.channels_last)
        for group in config.data.crops
    ]
    return Views.numbered(images, config.train.global_batch, config.method.facts, config.method.sounds())


class _EveryOther(nn.Module):
    """Every other pixel of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


def calm(method: nn.Module) -> None:
    """Small residual branches at the start, and smooth functions in place of ReLU and of the largest of a pool."""
    for block in list(method.modules()):
        if isinstance(block, BasicBlock | Bottleneck):
            nn.init.constant_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight, 0.1)
        for name, child in block.named_children():
            if isinstance(child, nn.ReLU):
                setattr(block, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(block, name, _EveryOther())


def train(config: Config, device: torch.device, steps: int = STEPS) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses of some steps, and the weights before the first, after it and after the last, in float64 on the CPU."""
    precision.set_up(config, device)
    torch.backends.cudnn.benchmark = False  # trying algorithms takes longer than these few steps
    torch.manual_seed(0)
    method = build_method(config)
    calm(method)
    engine = build_engine(method, config, device)
    if engine.loss_scale.enabled:
        engine.loss_scale.numbers[0] = 2.0**8  # nothing overflows: a step that is passed over cannot be compared
    losses, weights = [], [_weights(engine)]
    for step in range(steps):
        views = random_views(config, step, device, precision.views_dtype(config))
        output = engine.forward_backward(views, step)
        check = engine.check(views, output.loss)
        if check.trouble or check.overflow:
            raise ValueError(f"step {step}: {check.trouble or 'overflow'}")
        engine.update(check, step=step, lr=config.optim.lr, clip=0.0)
        losses.append(check.loss)
        if step in (0, steps - 1):
            weights.append(_weights(engine))
    return losses, weights


def _weights(engine: Any) -> dict[str, Tensor]:
    names = {f"model.{name}" for name, _ in engine.method.named_parameters()}
    return {name: _whole(value) for name, value in engine.model_state().items() if name in names}


def _whole(value: Tensor) -> Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().to("cpu", torch.float64, copy=True)


def oracle(report: Report, context: Context) -> None:
    """Run the networks on the CPU in float64, once for all strategies."""
    with process_group():
        for network in NETWORKS[context.small]:
            config = configuration(context, network, "train.precision=fp64", "parallel.strategy=ddp")
            losses, weights = train(config, torch.device("cpu"))
            tensors = {
                f"{moment} {name}": value for moment, state in enumerate(weights) for name, value in state.items()
            }
            path = _oracle_path(context, network)
            safetensors.torch.save_file({**tensors, "losses": torch.tensor(losses, dtype=torch.float64)}, path)
            moved = _length(_differences(weights[-1], weights[0])) / _length(weights[0])
            report.row(network, first_loss=losses[0], last_loss=losses[-1], weights_moved=f"{moved:.1%}")


def _oracle_path(context: Context, network: str) -> Path:
    return Path(context.folder) / f"oracle-{network.replace(' ', '-')}.safetensors"


def compare(report: Report, context: Context, strategy: str, *settings: str) -> None:
    """All networks and precisions under one strategy, with settings of it."""
    table = "Strategies against float64 on the CPU, relative errors"
    with process_group() as device:
        for name in PRECISIONS:
            for network in NETWORKS[context.small]:
                what = ", ".join((strategy, *settings, name, network))
                overrides = [f"train.precision={name}", f"parallel.strategy={strategy}", *settings]
                try:
                    losses, weights = train(configuration(context, network, *overrides), device)
                except InputError as error:
                    # Missing libraries are not installed; what a strategy refuses, it says in one line, as it should.
                    missing = isinstance(error.__cause__, ImportError)
                    report.row(
                        what,
                        NOT_INSTALLED if missing else OK,
                        str(error.__cause__) if missing else f"refused: {error}",
                        table=table,
                    )
                    continue
                except Exception as error:
                    traceback.print_exc()
                    report.judge(what, False, f"{type(error).__name__}: {error}", table=table)
                    continue
                exact = safetensors.torch.load_file(_oracle_path(context, network))
                errors = _errors(losses, weights, exact)
                bounds = BOUNDS[name]
                fits = [error <= bound for error, bound in zip(errors, (*bounds, bounds[2]), strict=True)]
                report.judge(
                    what,
                    all(fits),
                    f"beyond the bounds; most of it after a step in {_worst(weights, exact)}",
                    table=table,
                    first_loss=errors[0],
                    change_in_a_step=errors[1],
                    change_in_5_steps=errors[2],
                    last_loss=errors[3],
                    bounds=" / ".join(f"{bound:g}" for bound in bounds),
                )
                gc.collect()  # an engine is a circle of references, and holds memory of the device


def _errors(losses: list[float], weights: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> tuple[float, ...]:
    """Of the first loss, the change of weights in one step, in all steps, and of the last loss."""
    changes = []
    for moment in (1, 2):
        own = _differences(weights[moment], weights[0])
        right = {name: exact[f"{moment} {name}"] - exact[f"0 {name}"] for name in own}
        changes.append(_length(_differences(own, right)) / _length(right))
    first, last = (abs(losses[n] - float(exact["losses"][n])) / abs(float(exact["losses"][n])) for n in (0, -1))
    return first, *changes, last


def _worst(weights: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> str:
    """The three weights that hold most of the error after a step, each with its share and its relative error."""
    off, moved = {}, {}
    for name, start in weights[0].items():
        right = exact[f"1 {name}"] - exact[f"0 {name}"]
        off[name], moved[name] = float((weights[1][name] - start - right).norm()), float(right.norm())
    whole = math.hypot(*off.values())
    worst = sorted(off, key=lambda name: -off[name])[:3]
    return ", ".join(f"{name} ({off[name] / whole:.0%}, off by {off[name] / moved[name]:.1e})" for name in worst)


def _differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - other[name] for name, value in one.items()}


def _length(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([value.norm() for value in tensors.values()]).norm())


def fairscale_fsdp(report: Report, context: Context) -> None:
    """FairScale's FSDP, which no strategy offers: would it give the gradient that DDP gives?

    It asks CUDA for streams in every pass, so it cannot be tested where there is no GPU; what this case says of one
    decides whether it is worth an engine.
    """
    try:
        from fairscale.nn.data_parallel import FullyShardedDataParallel
    except ImportError as error:
        report.row("a step", NOT_INSTALLED, str(error))
        return
    with process_group() as device:
        config = configuration(context, "demo", "train.precision=fp32", "parallel.strategy=ddp")
        precision.set_up(config, device)
        views = random_views(config, 0, device, torch.float32)
        engine, method = build_engine(_seeded(config), config, device), _seeded(config).to(device)
        engine.forward_backward(views, 0)
        try:
            wrapped = FullyShardedDataParallel(method, flatten_parameters=False, compute_device=device)
            wrapped(views, 0).loss.backward()
        except Exception as error:
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
            if device.type == "cpu":
                report.row("a step", NEEDS_GPU, f"it asks for CUDA streams in every pass ({why})")
            else:
                report.row("a step", reason=f"it does not run: {why}")
            return
        expected = torch.cat([p.grad.flatten() for p in engine.method.parameters()])
        found = torch.cat([p.grad.flatten() for p in method.parameters()])
        report.row("a step", gradient_off_by=float((found - expected).norm() / expected.norm()))


def _seeded(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return build_method(config)
