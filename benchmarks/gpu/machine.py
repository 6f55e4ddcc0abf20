"""What the first case has found out about the machine, for the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu.harness import FACTS, Context

from largescale.plan.hardware import GPUS, gpu_like


def device_kind(context: Context) -> dict[str, Any]:
    """The facts, see `gpu.facts`."""
    return json.loads((Path(context.folder) / FACTS).read_text())


def planned_gpu(context: Context) -> str:
    """The kind of GPU in the planner's list; empty on a CPU, and for a GPU that it does not know."""
    facts = device_kind(context)
    return gpu_like(facts["device"], facts["memory_bytes"] / 1e9) if facts["kind"] == "cuda" else ""


def peak_flops(context: Context) -> float:
    """Of the data sheet, in half precision; 0 where there is none."""
    name = planned_gpu(context)
    return 1e12 * GPUS[name].tflops if name else 0.0
