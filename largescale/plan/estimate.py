"""From what a step does to how long it takes on a GPU, and whether it fits.

A step takes as long as its operators, each of which computes, moves its bytes or waits for its launch, whichever takes
longest; exchanges of weights and gradients hide behind that as far as they can, and what the computation waits for
(BatchNorm, the method's own, the norms of LARS, weights and gradients where the library overlaps them with nothing)
comes on top. All operators are counted as separate kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from largescale.plan.hardware import Assumptions, Gpu
from largescale.plan.phase import Phase
from largescale.plan.simulate import Simulation
from largescale.plan.trace import WEIGHTS, Collective


@dataclass(frozen=True)
class Estimate:
    """How long one training step takes, and the memory it needs per GPU.

    Attributes:
        compute_s: seconds of all operators.
        hidden_s, blocking_s: seconds of collectives that overlap with them, and of those that do not.
        waits_s: `blocking_s` by what is exchanged.
        step_s: seconds of the whole step.
        memory_gb: needed per GPU (1e9 bytes), with the assumed reserve and slack.
        fits: whether the GPU has that much.
        utilisation: FLOPs per second as a fraction of the data sheet's peak.
    """

    compute_s: float
    hidden_s: float
    blocking_s: float
    waits_s: dict[str, float]
    step_s: float
    memory_gb: float
    fits: bool
    utilisation: float


def estimate(step: Simulation, gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> Estimate:
    """Estimate time and memory of a simulated step by a roofline model.

    An operator takes as long as its arithmetic or its memory traffic, whichever is slower, but no less than a kernel
    launch. Collectives of weights and gradients overlap with operators; the others are waited for.

    Args:
        step: what is computed and sent.
        gpu: data sheet of the GPU.
        gpus_per_node: within which the fast network reaches.
        assume: how far real kernels and networks fall short of the data sheet.
    """
    compute, hidden, waits = _seconds(step, gpu, gpus_per_node, assume)
    blocking = sum(waits.values())
    seconds = max(compute, hidden) + blocking
    memory = step.most_held / 1e9 + assume.reserve_gb
    return Estimate(
        compute,
        hidden,
        blocking,
        waits,
        seconds,
        memory,
        memory <= gpu.memory_gb * (1 - assume.slack),
        step.flops / seconds / (gpu.tflops * 1e12),
    )


def phase_s(phase: Phase, gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> float:
    """How long it takes to embed all images once."""
    compute, hidden, waits = _seconds(phase, gpu, gpus_per_node, assume)
    return phase.calls * (max(compute, hidden) + sum(waits.values()))


def _seconds(
    work: Simulation | Phase, gpu: Gpu, gpus_per_node: int, assume: Assumptions
) -> tuple[float, float, dict[str, float]]:
    """Seconds of operators, of collectives that hide behind them, and of others by what they exchange."""
    compute = sum(
        max(
            operator.flops / (gpu.tflops * 1e12 * assume.math),
            operator.moved / (gpu.memory_gb_s * 1e9 * assume.bandwidth),
            assume.launch_us * 1e-6,
        )
        for operator in work.operators
    )
    times = {
        what: count * collective_s(what, work.sent[what] / count, gpu, gpus_per_node, assume)
        for what, count in work.counts.items()
    }
    hidden = sum(seconds for what, seconds in times.items() if what.of == WEIGHTS)
    waits: dict[str, float] = {}
    for what, seconds in times.items():
        if what.of != WEIGHTS:
            waits[what.of] = waits.get(what.of, 0.0) + seconds
    return compute, hidden, waits


def collective_s(what: Collective, size: float, gpu: Gpu, gpus_per_node: int, assume: Assumptions) -> float:
    """Seconds of one collective of `size` bytes, by rings: each rank sends size * (n - 1) / n, twice for a sum that
    all get.
    """
    if what.ranks == 1:
        return 0.0
    # Copies of HSDP are numbered a copy apart: where that is a node or more, each lies on another one.
    nodes = min(what.ranks, math.ceil(what.ranks * what.stride / gpus_per_node))
    inside = nodes == 1
    bandwidth = (gpu.link_gb_s if inside else gpu.network_gb_s) * 1e9 * assume.wire
    latency = assume.link_us if inside else assume.network_us + assume.hop_us * math.log2(nodes)
    passes = 2 if what.kind == "all-reduce" else 1
    return latency * 1e-6 + passes * size * (what.ranks - 1) / what.ranks / bandwidth
