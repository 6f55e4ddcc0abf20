"""The step of the recipe against a plain one, with each choice undone; and Sinkhorn against its published form."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sinkhorn
import step
import torch
from gpu.facts import synchronize
from gpu.harness import FAILED, LEFT_OUT, Context, Report
from gpu.machine import device_kind, peak_flops
from torch import Tensor

from largescale.parallel import precision
from largescale.plan.simulate import simulate
from largescale.processes import process_group

SMALL = [
    "model={backbone: resnet, stem: 3x3s2, depths: [1], width: 8}",
    "method={hidden: [32], embedding: 16, prototypes: 50}",
    "data.crops=[{num: 2, size: 24}, {num: 2, size: 16}]",
    "train.global_batch=16",
]
_LEAVE_S = 15.0
"""What is kept of the time for measuring, when variants are still to be built."""


def settings(context: Context) -> list[str]:
    """Of the step that is measured."""
    return SMALL if context.small else step.SETTINGS["cuda"]


def steps(report: Report, context: Context) -> None:
    """All variants in turns; one that fails is left out of the rounds."""
    config = step.configuration(settings(context), 0, "bf16")
    flops = simulate(config, 1).flops
    with process_group() as device:
        precision.set_up(config, device)
        built = _built(report, context, device)
        if "plain" not in built:
            return
        once = sum(step.in_turns(built, 1, device, warm_up=1)[name][0] for name in built)
        rounds = max(1, min(9, int((context.left_s() - 5) / once) - 2))
        seconds = step.in_turns(built, rounds, device, warm_up=2 if not context.small else 0)
    peak, batch = peak_flops(context), config.train.global_batch
    for name, times in seconds.items():
        middle = statistics.median(times)
        used = {"MFU": f"{flops / middle / peak:.1%}"} if peak else {}
        report.row(
            name,
            ms=1000 * middle,
            times_plain=step.times_plain(seconds, name),
            images_per_s=batch / middle,
            TFLOP_per_s=flops / middle / 1e12,
            rounds=rounds,
            **used,
        )


def _built(report: Report, context: Context, device: torch.device) -> dict[str, step.Step]:
    """Variants that ran once, and computed what the plain step does."""
    built: dict[str, step.Step] = {}
    losses: dict[str, float] = {}
    longest = 0.0
    for name, build in step.variants(device).items():
        if context.small and build is step.compiled:
            report.row(name, LEFT_OUT, "a CPU takes minutes to compile; see the section Correctness")
            continue
        if context.left_s() < _LEAVE_S + 1.2 * longest and "ours" in built:
            report.row(name, LEFT_OUT, "no time left")
            continue
        started = time.monotonic()
        try:
            built[name] = build(step.configuration(settings(context), 0, "bf16"), device)
            losses[name] = built[name]()
            # The unchecked step does not look at its loss.
            if "unchecked" not in name:
                step.compare_losses({"plain": losses["plain"], name: losses[name]}, "bf16")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            built.pop(name, None)
            report.row(name, FAILED, f"{type(error).__name__}: {error}")
        longest = max(longest, time.monotonic() - started)
        print(f"{name}: {time.monotonic() - started:.1f} s to build and for its first step", flush=True)
    return built


def codes(report: Report, context: Context) -> None:
    """Times and errors of all forms on the device, in a group of one."""
    with process_group() as device:
        for size in [(64, 300)] if context.small else sinkhorn.SIZES:
            if sinkhorn.fits(*size, 1, device.type):
                row = sinkhorn.compare(*size, 3 if context.small else 15, device)
                what = f"{sinkhorn.CROPS} x {row.pop('rows_a_rank')} rows, {row.pop('prototypes')} prototypes"
                report.row(what, **_ordered(row))


_CODES = {
    "as published": [],
    "ours": [],
    "by kernels": ["method.fused_sinkhorn=true"],
    "a head per group": ["method.fused_sinkhorn=true", "method.head_per_group=true", "method.overlap_codes=false"],
    "a head per group, beside the small crops": [
        "method.fused_sinkhorn=true",
        "method.head_per_group=true",
        "method.overlap_codes=true",
    ],
}
"""Ways to the codes of a step, by what is set."""


def exposed(report: Report, context: Context) -> None:
    """How long a step waits for its codes: device time from what is before them to what comes after, in real steps."""
    with process_group() as device:
        steps, losses, spent = {}, {}, dict[str, list[float]]()
        for name, overrides in _CODES.items():
            config = step.configuration([*settings(context), *overrides], 0, "bf16")
            precision.set_up(config, device)
            form = step.published_codes if name == "as published" else sinkhorn.sinkhorn
            steps[name], spent[name] = _timed_codes(step.ours(config, device), form, device), []
            losses[name] = steps[name](spent[name])
        rounds, seconds = 1 if context.small else 7, {name: list[float]() for name in steps}
        for number in range(rounds + 1):
            for name, one in steps.items():
                synchronize(device)
                started, own = time.perf_counter(), list[float]()
                one(own)
                synchronize(device)
                if number or context.small:
                    seconds[name].append(time.perf_counter() - started)
                    spent[name].append(sum(own))
        for name in steps:
            middle, codes = 1000 * statistics.median(seconds[name]), statistics.median(spent[name][-rounds:])
            pair = "a head per group" if name.startswith("a head") else "as published"
            off = abs(losses[name] - losses[pair]) / abs(losses[pair])
            beside = name.endswith("crops")
            report.judge(
                name,
                off <= (0 if beside else 1e-3),
                f"its first loss is not that of {pair!r}",
                step_ms=middle,
                codes_ms=codes,
                share="beside it" if beside else f"{codes / middle:.2%}",
                first_loss_off_by=off,
            )


def _timed_codes(one: step.Step, form: Callable[..., Tensor], device: torch.device) -> Callable[[list[float]], float]:
    """A step whose codes come by `form`; it also appends the milliseconds that they take where they are computed."""

    def measured(into: list[float]) -> float:
        marks = []

        def timed(*arguments: Any, **options: Any) -> Tensor:
            start = _mark(device)
            codes = form(*arguments, **options)
            marks.append((start, _mark(device)))
            return codes

        with patch(step.SINKHORN, timed):
            loss = one()
        synchronize(device)
        into += [_ms_between(*pair) for pair in marks]
        return loss

    return measured


def _mark(device: torch.device) -> Any:
    """A moment on the device's current stream; on a CPU, now."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms_between(start: Any, end: Any) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def _ordered(row: dict[str, Any]) -> dict[str, Any]:
    names = (
        "published_ms",
        "ours_ms",
        "kernels_ms",
        "kernels_device_ms",
        "limit_ms",
        "ratio",
        "published_error",
        "ours_error",
    )
    names += ("kernels_error", "published_mb", "ours_mb", "kernels_mb")
    return {"times faster" if name == "ratio" else name: row[name] for name in names if name in row}


def kept_path(context: Context, suffix: str) -> Path:
    """A file beside the page."""
    return Path(context.kept) / f"gpu_check_{device_kind(context)['slug']}{suffix}"
