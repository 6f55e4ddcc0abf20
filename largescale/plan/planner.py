"""`largescale plan`: what a recipe needs on a given number of GPUs, before anyone pays for them.

A step of the real method and strategy is run on fake tensors (simulate.py; like_*.py where the strategy's library takes
none); what it holds, computes and sends is turned into seconds by data sheets and stated assumptions (estimate.py,
hardware.py). Numbers of bytes and collectives are those of a real step; seconds are an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from largescale.config import Config
from largescale.data.length import NOMINAL, Length
from largescale.parallel import fsdp
from largescale.parallel.strategies import STRATEGIES, drawn_in_pieces
from largescale.plan.changes import fitting_changes
from largescale.plan.estimate import Estimate, estimate, phase_s
from largescale.plan.hardware import Assumptions, gpu_named
from largescale.plan.simulate import Simulation, simulate
from shards.ground.errors import InputError

IMAGENET = NOMINAL


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        gpus, gpu, gpus_per_node: how many, of which kind (see `hardware.GPUS`), and how they are housed.
        images: of the corpus.
        price: of a GPU for an hour; 0 leaves the cost out.
        assume: what no data sheet says.
    """

    gpus: int
    gpu: str = "h100"
    gpus_per_node: int = 8
    images: int = IMAGENET
    price: float = 0.0
    assume: Assumptions = field(default_factory=Assumptions)


def plan(config: Config, request: Request, *, advise: bool = True) -> dict[str, Any]:
    """The plan of a recipe, as plain numbers (see `table` for people).

    Args:
        config: the recipe.
        request: the hardware.
        advise: where it does not fit, look for a change that helps; each attempt simulates a step.

    Raises:
        InputError: hardware or a strategy that is not known, a recipe that the strategy does not permit, sizes that do
            not fit the GPUs.
    """
    _check(request)
    config = in_half_precision(config, request.gpu)
    step = simulate(config, request.gpus, request.images)
    guess = estimate(step, gpu_named(request.gpu), request.gpus_per_node, request.assume)
    found = _describe(config, request, step, guess)
    if advise and not guess.fits:
        found["advice"] = _advice(config, request, step)
    return found


def compare(config: Config, request: Request) -> list[dict[str, Any]]:
    """Plans of the same recipe under every strategy and, on several nodes, HSDP with a copy on every node.

    Returns:
        A plan each; of a strategy that does not permit the recipe only `strategy` and, as `left_out`, why.

    Raises:
        InputError: as `plan`; what DDP permits and another strategy does not is left out instead.
    """
    nodes = request.gpus // request.gpus_per_node
    copies = [nodes] if nodes > 1 and request.gpus % request.gpus_per_node == 0 else []
    others = [name for name in STRATEGIES if name not in ("ddp", "fsdp")]
    found = []
    for strategy, replicate in [("ddp", 1), ("fsdp", 1), *(("fsdp", n) for n in copies), *((n, 1) for n in others)]:
        sharded_init = drawn_in_pieces(config) and strategy == "fsdp"
        keys: dict[str, Any] = {"strategy": strategy, "replicate": replicate, "shard": 0, "sharded_init": sharded_init}
        changed = replace(config, parallel=replace(config.parallel, **keys))
        try:
            found.append(plan(changed, request, advise=False))
        except InputError as error:
            if strategy == "ddp":
                raise
            found.append({"strategy": _strategy(changed), "left_out": str(error)})
    return found


def _check(request: Request) -> None:
    if request.gpus < 1 or request.gpus_per_node < 1:
        raise InputError(f"--gpus {request.gpus} --gpus-per-node {request.gpus_per_node}: expected at least 1")
    if request.images < 1:
        raise InputError(f"--images {request.images}: expected at least 1")
    if not 0 <= request.price < math.inf:
        raise InputError(f"--price {request.price}: expected a price of a GPU for an hour, 0 or more")


def in_half_precision(config: Config, gpu: str) -> Config:
    """Half precisions, as training on these GPUs takes them for auto: theirs, if the strategy trains in it."""
    if config.train.precision not in ("auto", "bf16", "fp16"):
        return config
    half = gpu_named(gpu).half
    if half not in STRATEGIES[config.parallel.strategy].precisions:
        half = "bf16"
    return replace(config, train=replace(config.train, precision=half))


def other_precision(config: Config, request: Request) -> str:
    """What to say where a recipe chooses one half precision and the plan is in the other; empty if it is the same."""
    chosen, planned = config.train.precision, in_half_precision(config, request.gpu).train.precision
    if chosen in ("auto", planned):
        return ""
    gpu, strategy = gpu_named(request.gpu), f"parallel.strategy={config.parallel.strategy}"
    why = (
        f"the half precision of {request.gpu}"
        if planned == gpu.half
        else f"since {strategy} does not train in {chosen}"
    )
    return f"train.precision={chosen}: planned in {planned}, {why}; set train.precision={planned} to train as planned"


def emulated(plans: Sequence[dict[str, Any]], request: Request) -> str:
    """What to say where plans are in bf16 and the GPUs only emulate it; empty if none is."""
    slow = [found["strategy"] for found in plans if found.get("precision") == "bf16"]
    if not slow or gpu_named(request.gpu).half == "bf16":
        return ""
    return f"train.precision=bf16: {request.gpu} emulates it, so {', '.join(slow)} will take longer than planned"


def _describe(config: Config, request: Request, step: Simulation, guess: Estimate) -> dict[str, Any]:
    gpu, batch = gpu_named(request.gpu), config.train.global_batch
    steps = Length.nominal(config, request.images).num_steps
    phases = _phases(request, step)
    hours = (steps * guess.step_s + phases.get("count", 0) * phases.get("seconds", 0)) / 3600
    parts = {
        "weights": step.weights,
        "gradients": step.gradients,
        "optimizer": step.optimizer,
        "buffers": step.buffers,
        "views": step.views,
        "kept for the backward pass": step.kept,
    }
    return {
        "recipe": config.name,
        "strategy": _strategy(config),
        "precision": config.train.precision,
        "gpus": request.gpus,
        "gpu": request.gpu,
        "global_batch": batch,
        "batch_per_gpu": batch // request.gpus,
        "accumulate": config.train.accumulate,
        "parameters": step.parameters,
        "trained": step.trained,
        "memory_gb": {
            **{name: size / 1e9 for name, size in parts.items()},
            "peak of a step": step.peak / 1e9,
            **({"peak of an offline phase": step.held_in_a_phase / 1e9} if step.phase else {}),
            "reserve": request.assume.reserve_gb,
            "needed": guess.memory_gb,
            "of the GPU": gpu.memory_gb,
        },
        "fits": guess.fits,
        "collectives": [
            {"kind": what.kind, "ranks": what.ranks, "of": what.of, "count": count, "bytes": step.sent[what]}
            for what, count in sorted(step.counts.items())
        ],
        "flops": step.flops,
        "bytes_moved": sum(operator.moved for operator in step.operators),
        "seconds": {
            "compute": guess.compute_s,
            "collectives behind it": guess.hidden_s,
            "collectives it waits for": guess.blocking_s,
            **{f"of these {what}": seconds for what, seconds in sorted(guess.waits_s.items())},
            "step": guess.step_s,
        },
        "offline_phases": phases,
        "utilisation": guess.utilisation,
        "images_per_s": batch / guess.step_s,
        "images_per_s_per_node": batch / guess.step_s / max(1, request.gpus / request.gpus_per_node),
        "images": request.images,
        "steps": steps,
        "epochs_per_day": 86400 / guess.step_s * batch / request.images,
        "hours": hours,
        "gpu_hours": hours * request.gpus,
        "cost": hours * request.gpus * request.price,
        "assumptions": {**asdict(request.assume), "gpus_per_node": request.gpus_per_node, **asdict(gpu)},
    }


def _phases(request: Request, step: Simulation) -> dict[str, float]:
    """Number of the offline phases, and seconds of each, in which all images are embedded; empty if there are none."""
    if step.phase is None:
        return {}
    seconds = phase_s(step.phase, gpu_named(request.gpu), request.gpus_per_node, request.assume)
    return {"count": step.phase.count, "seconds": seconds}


def _strategy(config: Config) -> str:
    copies = fsdp.settings(config).replicate
    hybrid = config.parallel.strategy == "fsdp" and copies > 1
    return f"fsdp, {copies} copies" if hybrid else config.parallel.strategy


def _advice(config: Config, request: Request, step: Simulation) -> str:
    """The first change that makes a recipe fit."""
    reserve = request.assume.reserve_gb * 1e9
    available = gpu_named(request.gpu).memory_gb * (1 - request.assume.slack) * 1e9
    tried = list(
        fitting_changes(
            config,
            request.gpus,
            step,
            available=available,
            needed=lambda _, changed: changed.most_held + reserve,
            images=request.images,
        )
    )
    best = min(tried, key=lambda change: change.needed, default=None)
    if best is None:
        return "use more or larger GPUs"
    text = f"{' '.join(best.overrides)} needs {best.needed / 1e9:.1f} GB"
    return f"{text} and fits" if best.fits else f"no change tried fits (best: {text}); use more or larger GPUs"
