"""A profile of the step: its kernels by time in a table, and a trace to look at beside the page."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import step
import torch
from gpu.harness import Context, Report
from gpu.speed import kept_path, settings
from torch.profiler import ProfilerActivity, profile

from largescale.parallel import precision
from largescale.processes import process_group

STEPS = 2
_MOST_BYTES = 8_000_000
"""Of the packed trace; a larger one is not kept."""


def kernels(report: Report, context: Context) -> None:
    """Profile a few steps; the ten kernels (on a CPU: operators) that take longest."""
    config = step.configuration(settings(context), 0, "bf16")
    with process_group() as device:
        precision.set_up(config, device)
        one = step.ours(config, device)
        for _ in range(3):
            one()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities, acc_events=True) as found:
            for _ in range(STEPS):
                one()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    on_gpu = device.type == "cuda"
    rows = [
        (event, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in found.key_averages()
        if not on_gpu or event.device_type.name == "CUDA"
    ]
    total = sum(spent for _, spent in rows) or 1.0
    for event, spent in sorted(rows, key=lambda row: -row[1])[:10]:
        report.row(
            event.key[:90],
            ms_a_step=spent / 1000 / STEPS,
            share=f"{spent / total:.1%}",
            calls_a_step=event.count // STEPS,
        )
    _keep(report, context, found)


def _keep(report: Report, context: Context, found: Any) -> None:
    plain, packed = Path(context.folder) / "trace.json", kept_path(context, ".trace.json.gz")
    found.export_chrome_trace(str(plain))
    packed.parent.mkdir(parents=True, exist_ok=True)
    with plain.open("rb") as source, gzip.open(packed, "wb") as target:
        shutil.copyfileobj(source, target)
    size = packed.stat().st_size
    if size > _MOST_BYTES:
        packed.unlink()
    where = packed.name if size <= _MOST_BYTES else f"not kept: more than {_MOST_BYTES / 1e6:.0f} MB"
    report.row(f"trace of {STEPS} steps, for chrome://tracing", table="The trace", file=where, MB=size / 1e6)
