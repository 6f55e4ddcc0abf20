"""What is measured on: names and versions, and the two ceilings that every other number is seen against."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from gpu.harness import FACTS, Context, Report
from gpu.page import slug

from largescale.run.folder import environment


def find(report: Report, context: Context) -> None:
    """Write the names to the run's folder; report the ceilings."""
    machine = environment()
    cuda = context.device != "cpu" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "cpu"
    hardware = f"{machine['processor']}, {machine['cpu_cores']} cores"
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    if cuda:
        hardware = f"{name}, {memory / 2**30:.0f} GiB; {hardware}"
    facts = {
        "device": name if cuda else f"CPU ({machine['processor']})",
        "slug": slug(name),
        "kind": "cuda" if cuda else "cpu",
        "memory_bytes": memory,
        "hardware": hardware,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "revision": machine["git_revision"],
    }
    (Path(context.folder) / FACTS).write_text(json.dumps(facts))
    device = torch.device(facts["kind"])
    side, count = (8192, 2**30) if cuda else (1024, 2**25)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    seconds = median_s(lambda: matrix @ matrix, device)
    report.row(f"bf16 matrix product, {side} a side", figure=f"{2 * side**3 / seconds / 1e12:.1f} TFLOP/s")
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source), device)
    report.row(f"copy of {count / 2**20:.0f} MiB, read and written", figure=f"{2 * count / seconds / 1e9:.0f} GB/s")


def median_s(action: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median seconds of something on the device, after three times to warm up."""
    seconds = []
    for number in range(repeats + 3):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        if number >= 3:
            seconds.append(time.perf_counter() - started)
    return sorted(seconds)[repeats // 2]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
