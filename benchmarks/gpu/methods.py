"""Every method on the device: the steps of the tests' harness against float64 on the CPU, and the published step."""

from __future__ import annotations

import gc
import math
import statistics
import time
import traceback
from typing import Any

import overheads
import step
import torch
from gpu.facts import synchronize
from gpu.harness import FAILED, LEFT_OUT, Context, Report
from gpu.numerics import count_waits
from torch import Tensor

from largescale.methods import METHODS, build_method
from largescale.parallel import precision
from largescale.parallel.strategies import build_engine
from largescale.processes import process_group
from tests.methods import harness

_EVERY_SMALL = 8
"""One of so many methods is enough to see that the cases run."""
_BATCH = 128
_ROUNDS = 5
_MORE_WAITS = {"directpred": 1}
"""Beside the look at loss and gradients: for eigenvalues, of which torch asks whether they were found."""
_LEAVE_S = 8.0
"""What one recipe may take to build and to try algorithms."""


def _names(context: Context) -> list[str]:
    return list(METHODS)[:: _EVERY_SMALL if context.small else 1]


def compare(report: Report, context: Context) -> None:
    """Steps, phases and updates of small networks: in float64 all must be equal, in less the first losses nearly.

    In float64 roundings decide nothing, so whatever differs by more than 1e-7 is another arithmetic: a wrong layout, a
    value that is read before it is there, a device that is not asked. Of fp32 and bf16 the first loss is compared, by
    the bounds of `gpu.strategies` on losses; where clusters come before it, what they round to may differ by more.
    """
    with process_group() as device:
        for name in _names(context):
            try:
                _compare(report, name, device)
            except Exception as error:
                traceback.print_exc()
                report.row(name, FAILED, f"{type(error).__name__}: {error}")
            gc.collect()


def _compare(report: Report, name: str, device: torch.device) -> None:
    torch.backends.cudnn.benchmark = False  # trying algorithms takes longer than these few steps
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact = harness.train(harness.mini(name))
    own = harness.train(harness.mini(name), device=device)
    losses = max(_relative(a, b) for a, b in zip(own["losses"], exact["losses"], strict=True))
    keys = [key for key, value in exact["state"].items() if value.is_floating_point()]
    state, key = max((_distance(own["state"][key], exact["state"][key]), key) for key in keys)
    first, finite = {}, True
    for kind in ("fp32", "bf16"):
        run = harness.train(harness.mini(name, f"train.precision={kind}"), device=device)
        first[kind] = _relative(run["losses"][0], exact["losses"][0])
        finite &= all(map(math.isfinite, run["losses"]))
    clustered = build_method(harness.mini(name), harness.LENGTH).phase_due(0)
    holds = losses <= 1e-7 and state <= 1e-6 and finite
    holds &= clustered or (first["fp32"] <= 1e-4 and first["bf16"] <= 0.05)
    report.judge(
        name,
        holds,
        f"beyond the bounds; of the state {key} is off most",
        losses_fp64=losses,
        state_fp64=state,
        first_loss_fp32=first["fp32"],
        first_loss_bf16=first["bf16"],
    )


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(1.0, abs(expected))


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected.double()).norm() / (expected.double().norm() + 1e-3))


def costs(report: Report, context: Context) -> None:
    """A step of each published recipe on views that are there: time, memory, and how often the host waits."""
    with process_group() as device:
        for name in [name for name in _names(context) if overheads.comes_alone(name)]:
            if context.left_s() < _LEAVE_S:
                report.row(name, LEFT_OUT, "no time left")
                continue
            try:
                _cost(report, context, name, device)
            except Exception as error:
                traceback.print_exc()
                report.row(name, FAILED, f"{type(error).__name__}: {error}")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _cost(report: Report, context: Context, name: str, device: torch.device) -> None:
    batch = 8 if context.small else _BATCH
    recipe, config = overheads.published(name, batch, small=context.small)
    config.train.precision = "fp32" if context.small else "bf16"
    precision.set_up(config, device)
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, device)
    views = step.views(config, device)

    def one() -> None:
        check = engine.check(views, engine.forward_backward(views, 0).loss)
        engine.update(check, step=0, lr=config.optim.lr, clip=0.0)

    for _ in range(1 if context.small else 3):  # algorithms are tried
        one()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(1 if context.small else _ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        one()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    middle, cells = statistics.median(seconds), dict[str, Any]()
    if device.type == "cuda":
        cells["peak_GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        waits = count_waits(one)
        cells |= {"waits": len(waits), "which": ", ".join(waits)}
    report.judge(
        name,
        cells.get("waits", 0) <= 1 + _MORE_WAITS.get(name, 0),
        "a step makes the host wait more often than it must",
        recipe=recipe,
        ms=1000 * middle,
        images_per_s=batch / middle,
        **cells,
    )
