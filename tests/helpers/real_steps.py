"""What steps of real engines do, to compare plans with."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from largescale.clustering import kmeans
from largescale.config import Config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.parallel import zero
from largescale.parallel.engine import Engine
from largescale.parallel.precision import views_dtype
from largescale.parallel.strategies import build_engine
from largescale.plan.simulate import local_bytes
from largescale.plan.stages import steps_of_stages
from largescale.plan.trace import WAITED, WEIGHTS, Collective, StepTrace
from tests.methods.harness import views_of_step

LIMITS = {
    "stage3_param_persistence_threshold": 300,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_reuse_distance": 3000,
}
"""So small that some parameters of the small networks are gathered ahead and freed again."""


def tighten(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Give DeepSpeed small buckets and `LIMITS`, and clusters products whose operations torch counts, which it does not
    those of oneDNN, in real steps and in plans.
    """
    original = zero.deepspeed_config

    def config(*arguments: object) -> dict[str, object]:
        found = original(*arguments)
        if found["zero_optimization"]["stage"] == 3:
            found["zero_optimization"] |= LIMITS
        return found

    set_attribute(zero, "_BUCKET_ELEMENTS", 2500)
    set_attribute(zero, "deepspeed_config", config)
    set_attribute(kmeans, "_is_for_onednn", lambda tensor: False)


def real_steps(configs: list[Config]) -> list[dict[str, Any]]:
    """What a rank did in the third step of each, and of each of its stages."""
    tighten()
    return [_real_step(config) for config in configs]


def _real_step(config: Config) -> dict[str, Any]:
    older = _live_tensors()  # DeepSpeed does not let go of the engine of the case before
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    views = views_of_step(config, 0)
    views = views._replace(images=[images.to(views_dtype(config)) for images in views.images])
    ids, peak, gradients = {id(tensor) for tensor in older}, 0, 0
    for step in steps_of_stages(engine.method):
        for _ in range(2):  # in these DeepSpeed learns in which order the modules run
            _one_step(engine, views, step)
        trace = StepTrace()
        gc.collect()
        trace.watch(tensor for tensor in _live_tensors() if id(tensor) not in ids)
        with trace:
            gradients = max(gradients, _one_step(engine, views, step))
        peak = max(peak, trace.peak)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        _one_step(engine, views, step)
    optimizer = local_bytes(value for state in engine.optimizer.state.values() for value in state.values())
    return {
        "counts": trace.counts,
        "sent": trace.sent,
        "flops": sum(o.flops for o in trace.operators),
        "weights": local_bytes(_weights_of(engine)),
        "gradients": gradients,
        "optimizer": optimizer,
        "peak": peak,
        "profiled": sum(event.name.startswith("c10d::") for event in recorded.events()),
    }


def _one_step(engine: Engine, views: Views, step: int) -> int:
    """Returns bytes of gradients, of the objective that has most."""
    gradients = 0
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.1
    for objective in engine.method.objectives_of(step):
        engine.forward_backward(views, step, objective)
        gradients = max(gradients, local_bytes(engine.gradients()))
        engine.apply_gradients(step)
    return gradients


def _live_tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu"]


def _weights_of(engine: Engine) -> list[Tensor]:
    """All that a rank holds of weights: DeepSpeed's flat tensors, what it updates, and what is gathered."""
    sharded = getattr(engine, "zero", None)
    parameters = list(engine.method.parameters())
    if sharded is None:
        return parameters
    if engine.stage < 3:
        frozen = [p for p in parameters if not p.requires_grad]
        return [*sharded.bit16_groups_flat, *sharded.single_partition_of_fp32_groups, *frozen]
    return [
        *(p.ds_tensor for p in parameters),
        *sharded.fp32_partitioned_groups_flat,
        *(p.data for p in parameters if p.data.shape == p.ds_shape),
    ]


def merged(found: Counter[Collective]) -> Counter[Collective]:
    """A real step does not show which exchanges it waits for."""
    total: Counter[Collective] = Counter()
    for what, number in found.items():
        total[what._replace(of=WEIGHTS if what.of == WAITED else what.of)] += number
    return total
