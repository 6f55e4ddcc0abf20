"""Pieces that run differently on a GPU, each against what it must equal: augmentation, BatchNorm, Sinkhorn, compiled
and recomputed blocks; and how often a step waits for the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from gpu.facts import synchronize
from gpu.harness import NEEDS_GPU, Context, Report
from gpu.strategies import calm, random_views, recipe
from torch import Tensor, nn

from largescale.config import AugmentConfig
from largescale.data.augment import Augment
from largescale.data.augment_draws import DRAWS
from largescale.data.loaded import Batch
from largescale.methods import build_method
from largescale.methods.sinkhorn import sinkhorn
from largescale.observe.meter import Meter
from largescale.parallel import precision
from largescale.parallel.batchnorm import _SyncBatchNorm
from largescale.parallel.strategies import build_engine
from largescale.processes import process_group

_EVERYTHING = {"rotate_degrees": 15, "gamma": 0.3, "gain": 0.2, "noise": 0.1, "erase": 0.5}


def augmentation(report: Report, context: Context) -> None:
    """The compiled chain on the device against the eager one on the CPU, with every kind of change."""
    device, side, count = torch.device(context.device), *((16, 8) if context.small else (96, 32))
    # The 16 branches of the whole colour jitter take a CPU's compiler minutes.
    less = {"blur_sigma": [0.1, 0.5], "saturation": 0.0, "hue": 0.0} if context.small else {}
    config = AugmentConfig(**_EVERYTHING, **less)
    views = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=_generator(0))
    draws = torch.rand(count, DRAWS, dtype=torch.float64, generator=_generator(1))
    options = (config, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = Augment(*options, torch.float64)(views, draws)
    chain, on_device = Augment(*options, torch.float32, compiled=True), (views.to(device), draws.to(device))
    found = chain(*on_device)
    off = (found.cpu().double() - expected).abs()
    # Where two channels are nearly equal, the hue's angle turns on round-off: a few pixels may differ.
    share = float((off > 1e-3).double().mean())
    report.judge(
        f"compiled in float32 on {device.type} against eager in float64",
        share < 1e-3,
        "more than one pixel in a thousand is off by 0.001",
        largest=float(off.max()),
        mean=float(off.mean()),
        pixels_off=f"{share:.2%}",
    )
    report.judge("channels last in memory", found.is_contiguous(memory_format=torch.channels_last), "another layout")
    _waits(report, context, "compiled augmentation", lambda: chain(*on_device), most=0)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _waits(report: Report, context: Context, what: str, action: Any, *, most: int) -> None:
    """How often something makes the host wait for the device; torch warns of each time if asked."""
    if context.device == "cpu":
        report.row(f"{what}: waits for the device", NEEDS_GPU)
        return
    places = count_waits(action)
    report.judge(
        f"{what}: waits for the device", len(places) <= most, ", ".join(places), times=len(places), allowed=most
    )


def count_waits(action: Callable[[], object]) -> list[str]:
    """Where something makes the host wait for the device, each time, as torch warns of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    return [f"{warning.filename.split('/')[-1]}:{warning.lineno}" for warning in waits]


def steps_that_wait(report: Report, context: Context) -> None:
    """A training step may wait once: to look at loss and gradients before the update."""
    with process_group() as device:
        config = recipe(
            [
                "model={backbone: resnet, stem: 3x3s2, depths: [1, 1], width: 8}",
                "method={hidden: [32], embedding: 16, prototypes: 30}",
                "data.crops=[{num: 2, size: 28}, {num: 1, size: 24}]",
                "train.global_batch=16",
                "train.precision=bf16",
                "parallel.strategy=ddp",
            ]
        )
        precision.set_up(config, device)
        engine = build_engine(build_method(config), config, device)
        meter = Meter(engine.method, 16, 160, device)
        views = random_views(config, 0, device, torch.bfloat16)
        batch = Batch(0, torch.arange(16), [], views.images, {}, [], [], {})

        def step() -> None:
            output = engine.forward_backward(views, 0)
            check = engine.check(views, output.loss)
            engine.update(check, step=0, lr=0.1, clip=0.0)
            meter.add(output, check, 0.0, batch)

        for _ in range(3):
            step()
        synchronize(device)
        _waits(report, context, "a training step", step, most=1)


def batchnorm(report: Report, context: Context) -> None:
    """Both synchronised BatchNorms, over a group of one, against ordinary BatchNorm in float64 on the CPU."""
    bounds = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
    with process_group() as device:
        for dtype, bound in bounds.items():
            for layout in ("NCHW", "channels last"):
                x = torch.randn(16, 24, 9, 9, generator=_generator(0)) + 3.0  # an offset: sums of squares would cancel
                if layout != "NCHW":
                    x = x.contiguous(memory_format=torch.channels_last)
                x = x.to(device, dtype)
                expected = _ordinary(x.double().cpu())
                for name, run in _NORMS.items():
                    what = f"{name}, {str(dtype).removeprefix('torch.')}, {layout}"
                    if name == "torch's" and device.type == "cpu":
                        if layout == "NCHW" and dtype == torch.float32:
                            report.row("torch's SyncBatchNorm", NEEDS_GPU)
                        continue
                    errors = {part: _error(value, expected[part]) for part, value in run(x).items()}
                    report.judge(what, max(errors.values()) <= bound, f"an error beyond {bound:g}", **errors)


def _error(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().double().cpu() - expected).norm() / expected.norm())


def _parameters(channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.linspace(0.5, 1.5, channels, dtype=torch.float64)
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    return tuple(value.to(like.device, kind).requires_grad_() for value in (weight, weight.flip(0)))


def _slopes(y: Tensor) -> Tensor:
    generator = _generator(2)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


def _ordinary(x: Tensor) -> dict[str, Tensor]:
    norm = nn.BatchNorm2d(x.shape[1], dtype=torch.float64)
    weight, bias = _parameters(x.shape[1], x)
    norm.weight, norm.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(_slopes(y))
    return {
        "output": y.detach(),
        "input gradient": x.grad,
        "weight gradient": norm.weight.grad,
        "running variance": norm.running_var,
    }


def _ours(x: Tensor) -> dict[str, Tensor]:
    weight, bias = _parameters(x.shape[1], x)
    x = x.clone().requires_grad_()
    y, _, var = _SyncBatchNorm.apply(x, weight, bias, 1e-5, None)
    y.backward(_slopes(y))
    count = x.numel() / x.shape[1]
    return {
        "output": y,
        "input gradient": x.grad,
        "weight gradient": weight.grad,
        "running variance": 0.9 + 0.1 * var * count / (count - 1),
    }


def _torchs(x: Tensor) -> dict[str, Tensor]:
    """The exchange of torch's SyncBatchNorm, which the module leaves out in a group of one."""
    from torch.nn.modules._functions import SyncBatchNorm

    weight, bias = _parameters(x.shape[1], x)
    x = x.clone().requires_grad_()
    mean, var = torch.zeros(x.shape[1], device=x.device), torch.ones(x.shape[1], device=x.device)
    y = SyncBatchNorm.apply(x, weight, bias, mean, var, 1e-5, 0.1, torch.distributed.group.WORLD, 1)
    y.backward(_slopes(y))
    return {"output": y, "input gradient": x.grad, "weight gradient": weight.grad, "running variance": var}


_NORMS = {"ours": _ours, "torch's": _torchs}


_POOLS = {
    "largest of 3 x 3": lambda x: nn.functional.max_pool2d(x, 3, 2, 1),
    "average of 3 x 3": lambda x: nn.functional.avg_pool2d(x, 3, 2, 1),
    "average of a map": lambda x: nn.functional.adaptive_avg_pool2d(x, 1),
}


def pools(report: Report, context: Context) -> None:
    """Pooling layers, in both layouts, against the same numbers in float64 on the CPU.

    No network here averages overlapping windows: in torch 2.11 its gradient for channels last is wrong on CUDA.
    """
    device = torch.device(context.device)
    for dtype, bound in {torch.float32: 1e-6, torch.bfloat16: 1e-2}.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            start = torch.randn(4, 64, 32, 32, generator=_generator(5)).to(dtype).contiguous(memory_format=layout)
            for name, pool in _POOLS.items():
                found, expected = (_pooled(pool, x) for x in (start.to(device), start.double()))
                errors = {part: _error(value, expected[part]) for part, value in found.items()}
                what = f"{name}, {str(dtype).removeprefix('torch.')}, {_LAYOUTS[layout]}"
                right = max(errors.values()) <= bound
                if name in _UNUSED and not right:
                    report.row(what, reason="wrong, and used by no network here", **errors)
                else:
                    report.judge(what, right, f"an error beyond {bound:g}", **errors)


_UNUSED = ("average of 3 x 3",)
_LAYOUTS = {torch.contiguous_format: "NCHW", torch.channels_last: "channels last"}


def _pooled(pool: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = pool(x)
    y.backward(_slopes(y))
    return {"output": y.detach(), "gradient": x.grad}


def codes(report: Report, context: Context) -> None:
    """Sinkhorn on the device in float32 against float64 on the CPU, at both ends of epsilon."""
    device, rows, prototypes = torch.device(context.device), *((64, 300) if context.small else (2048, 3000))
    features = nn.functional.normalize(torch.randn(2, rows, 128, generator=_generator(3)), dim=-1)
    heads = nn.functional.normalize(torch.randn(prototypes, 128, generator=_generator(4)), dim=-1)
    scores = features @ heads.T
    for epsilon in (0.05, 0.01):
        options = {"epsilon": epsilon, "iterations": 3}
        exact = sinkhorn(scores.double(), **options)
        for fused in (False, True) if device.type == "cuda" and epsilon > 1 / 35 else (False,):
            found = sinkhorn(scores.to(device), **options, check_range=not fused, fused=fused)
            largest = float((found.cpu().double() - exact).abs().max())
            report.judge(
                f"epsilon {epsilon}, 2 x {rows} rows, {prototypes} prototypes{', fused' if fused else ''}",
                largest <= 1e-5,
                "beyond 1e-5",
                largest_error=largest,
                rows_sum_to_1_within=float((found.sum(-1) - 1).abs().max()),
            )


def blocks(report: Report, context: Context, what: str) -> None:
    """A step with compiled or recomputed blocks against one without: loss, gradients and running statistics."""
    small = context.small
    sizes = ["model.depths=[1]", "model.width=8"] if small else ["model.depths=[1, 1, 1, 1]", "model.width=64"]
    stages = "[1]" if small else "[1, 2, 3, 4]"
    shared = [
        "model={backbone: resnet, block: bottleneck, stem: 3x3s2}",
        "method={hidden: [32], embedding: 16, prototypes: 30}",
        *sizes,
        f"data.crops=[{{num: 2, size: {16 if small else 96}}}]",
        "train.global_batch=16",
        "train.precision=fp64",
        "parallel.strategy=ddp",
    ]  # in fp32 a ReLU may open in one of them alone
    with process_group() as device:
        plain, changed = (_step(recipe([*shared, *more]), device) for more in ([], [f"model.{what}={stages}"]))
        errors = {part: _error(changed[part], plain[part].double().cpu()) for part in plain}
        report.judge(f"{what}={stages}, fp64", max(errors.values()) <= 1e-9, "an error beyond 1e-9", **errors)


def _step(config: Any, device: torch.device) -> dict[str, Tensor]:
    precision.set_up(config, device)
    torch.manual_seed(0)
    method = build_method(config)
    calm(method)
    engine = build_engine(method, config, device)
    loss = engine.forward_backward(random_views(config, 0, device, torch.float64), 0).loss
    statistics = [value.flatten() for name, value in method.named_buffers() if name.endswith("running_var")]
    return {
        "loss": loss[None],
        "gradient": torch.cat([grad.flatten() for grad in engine.gradients()]),
        "running variances": torch.cat(statistics),
    }
