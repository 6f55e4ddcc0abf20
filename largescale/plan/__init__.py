"""`largescale plan`: what a recipe takes on so many GPUs, before anybody pays for them.

A step of the real method and strategy is run on fake tensors (simulate.py; like_*.py where the strategy's library takes
none); what it holds, computes and sends is turned into seconds by data sheets and stated assumptions (estimate.py,
hardware.py). Numbers of bytes and collectives are those of a real step; seconds are an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from largescale.config import Config
from largescale.methods import build_method
from largescale.models.backbones import stages
from largescale.parallel import STRATEGIES
from largescale.plan.estimate import Estimate, estimate
from largescale.plan.hardware import Assumptions, gpu_named
from largescale.plan.simulate import Simulation, simulate
from shards.errors import InputError

IMAGENET = 1_281_167


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
    config = _in_half_precision(config, gpu_named(request.gpu).half)
    step = simulate(config, request.gpus)
    guess = estimate(step, gpu_named(request.gpu), request.gpus_per_node, request.assume)
    found = _describe(config, request, step, guess)
    if advise and not guess.fits:
        found["advice"] = _advice(config, request)
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
        sharded_init = config.parallel.sharded_init and strategy == "fsdp"
        changed = replace(config, parallel=replace(
            config.parallel, strategy=strategy, replicate=replicate, shard=0, sharded_init=sharded_init))
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


def _in_half_precision(config: Config, half: str) -> Config:
    if config.train.precision not in ("auto", "bf16", "fp16"):
        return config
    return replace(config, train=replace(config.train, precision=half))


def _describe(config: Config, request: Request, step: Simulation, guess: Estimate) -> dict[str, Any]:
    gpu, batch = gpu_named(request.gpu), config.train.global_batch
    steps = config.train.steps or max(1, int(request.images // batch * config.train.epochs))
    hours = steps * guess.step_s / 3600
    parts = {"weights": step.weights, "gradients": step.gradients, "optimizer": step.optimizer,
             "buffers": step.buffers, "views": step.views, "kept for the backward pass": step.kept}
    return {
        "recipe": config.name, "strategy": _strategy(config), "precision": config.train.precision,
        "gpus": request.gpus, "gpu": request.gpu, "global_batch": batch, "batch_per_gpu": batch // request.gpus,
        "accumulate": config.train.accumulate, "parameters": step.parameters,
        "memory_gb": {**{name: size / 1e9 for name, size in parts.items()}, "peak of a step": step.peak / 1e9,
                      "reserve": request.assume.reserve_gb, "needed": guess.memory_gb, "of the GPU": gpu.memory_gb},
        "fits": guess.fits,
        "collectives": [
            {"kind": what.kind, "ranks": what.ranks, "of": what.of, "count": count, "bytes": step.sent[what]}
            for what, count in sorted(step.counts.items())
        ],
        "flops": step.flops, "bytes_moved": sum(operator.moved for operator in step.operators),
        "seconds": {"compute": guess.compute_s, "collectives behind it": guess.hidden_s,
                    "collectives it waits for": guess.blocking_s,
                    **{f"of these {what}": seconds for what, seconds in sorted(guess.waits_s.items())},
                    "step": guess.step_s},
        "utilisation": guess.utilisation,
        "images_per_s": batch / guess.step_s, "images_per_s_per_node":
            batch / guess.step_s / max(1, request.gpus / request.gpus_per_node),
        "images": request.images, "steps": steps, "epochs_per_day": 86400 / guess.step_s * batch / request.images,
        "hours": hours, "gpu_hours": hours * request.gpus, "cost": hours * request.gpus * request.price,
        "assumptions": {**asdict(request.assume), "gpus_per_node": request.gpus_per_node, **asdict(gpu)},
    }


def _strategy(config: Config) -> str:
    copies = config.parallel.replicate
    hybrid = config.parallel.strategy == "fsdp" and copies > 1
    return f"fsdp, {copies} copies" if hybrid else config.parallel.strategy


def _advice(config: Config, request: Request) -> str:
    """The first change that makes a recipe fit, among those that cost least."""
    least, best = math.inf, ""
    for changes, changed in _changes(config, request.gpus):
        found = plan(changed, request, advise=False)
        needed = found["memory_gb"]["needed"]
        text = f"{' '.join(changes)} needs {needed:.1f} GB"
        if found["fits"]:
            return f"{text} and fits"
        if needed < least:
            least, best = needed, text
    return f"even {best}: more GPUs, or larger ones" if best else "more GPUs, or larger ones"


def _changes(config: Config, gpus: int) -> Iterator[tuple[list[str], Config]]:
    """Recomputation, then sharding, then micro-batches, each on top of the ones before; in the end smaller batches,
    which train another recipe.
    """
    changes: list[str] = []
    every = list(range(1, 1 + len(stages(build_method(config, on_meta=True).backbone))))
    if config.model.recompute_stages != every:
        config = replace(config, model=replace(config.model, recompute_stages=every, compile_stages=[]))
        changes.append(f"model.recompute_stages={every}".replace(" ", ""))
        yield changes, config
    if config.parallel.strategy not in ("fsdp", "zero3"):
        config = replace(config, parallel=replace(config.parallel, strategy="fsdp"))
        changes.append("parallel.strategy=fsdp")
        yield changes, config
    if config.parallel.replicate > 1:
        config = replace(config, parallel=replace(config.parallel, replicate=1, shard=0))
        changes.append("parallel.replicate=1")
        yield changes, config
    batch, micro_batches = config.train.global_batch, config.train.accumulate
    for accumulate in (2 * micro_batches, 4 * micro_batches, 8 * micro_batches):
        if batch % (gpus * accumulate) == 0:
            yield [*changes, f"train.accumulate={accumulate}"], _train(config, accumulate=accumulate)
    for smaller in (batch // 2, batch // 4, batch // 8):
        if smaller and smaller % (gpus * micro_batches) == 0:
            yield [*changes, f"train.global_batch={smaller}"], _train(config, global_batch=smaller)


def _train(config: Config, **changes: int) -> Config:
    return replace(config, train=replace(config.train, **changes))
