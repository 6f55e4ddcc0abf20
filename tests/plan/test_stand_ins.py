"""Plans of DeepSpeed's and FairScale's strategies against real steps of these libraries.

Covers: largescale/plan/fetching.py, largescale/plan/like_ddp.py, largescale/plan/like_fairscale.py,
largescale/plan/like_zero.py, largescale/plan/like_zero12.py, largescale/plan/like_zero3.py,
largescale/plan/module_calls.py, largescale/plan/stand_in.py
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from largescale.data.views import Views
from largescale.methods import build_method
from largescale.parallel import zero
from largescale.parallel.engine import Engine
from largescale.parallel.precision import views_dtype
from largescale.parallel.strategies import build_engine
from largescale.plan.fetching import Coordinator, Event, Parameter
from largescale.plan.like_zero3 import _DEFAULTS
from largescale.plan.simulate import local_bytes, simulate
from largescale.plan.trace import WAITED, WEIGHTS, Collective, StepTrace
from tests.helpers.plans import configuration
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step

REGNET = ["model.backbone=regnet_y_400mf", "model.stem=3x3s2"]
LIMITS = {
    "stage3_param_persistence_threshold": 300,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_reuse_distance": 3000,
}
"""So small that some parameters of the small networks are gathered ahead and freed again."""

OVER_BATCH = ["train.accumulate=2", "train.loss_spans=global_batch"]

CASES = [
    (2, ["parallel.strategy=zero1"]),
    (2, ["parallel.strategy=zero1", "train.accumulate=2", "optim.name=adamw"]),
    (2, ["parallel.strategy=zero2", "train.accumulate=2", "train.precision=bf16"]),
    (2, ["parallel.strategy=zero3"]),
    (2, ["parallel.strategy=zero3", "train.accumulate=2", "optim.name=adamw", "train.precision=bf16"]),
    (2, ["parallel.strategy=zero3", "model.recompute_stages=[1,2]"]),
    (2, ["parallel.strategy=fairscale"]),
    (2, ["parallel.strategy=zero3", *REGNET]),
    (2, ["parallel.strategy=zero1", *OVER_BATCH]),
    (2, ["parallel.strategy=zero2", *OVER_BATCH]),
    (2, ["parallel.strategy=zero3", *OVER_BATCH]),
    (2, ["parallel.strategy=fairscale", *OVER_BATCH]),
    (4, ["parallel.strategy=zero2", "parallel.batchnorm_group_size=2"]),
    (4, ["parallel.strategy=zero3"]),
    (4, ["parallel.strategy=fairscale", "train.accumulate=2", "optim.name=adamw"]),
]


def tighten(set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Give DeepSpeed small buckets and `LIMITS`, in real steps and in plans."""
    original = zero.deepspeed_config

    def config(*arguments: object) -> dict[str, object]:
        found = original(*arguments)
        if found["zero_optimization"]["stage"] == 3:
            found["zero_optimization"] |= LIMITS
        return found

    set_attribute(zero, "_BUCKET_ELEMENTS", 2500)
    set_attribute(zero, "deepspeed_config", config)


def real_steps(cases: list[list[str]]) -> list[dict[str, object]]:
    """What a rank did in the third step of each case."""
    tighten()
    return [real_step(overrides) for overrides in cases]


def real_step(overrides: list[str]) -> dict[str, object]:
    config = configuration(overrides)
    older = live_tensors()  # DeepSpeed does not let go of the engine of the case before
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    views = views_of_step(config, 0)
    views = views._replace(images=[images.to(views_dtype(config)) for images in views.images])
    for _ in range(2):  # in these DeepSpeed learns in which order the modules run
        one_step(engine, views)
    trace = StepTrace()
    gc.collect()
    ids = {id(tensor) for tensor in older}
    trace.watch(tensor for tensor in live_tensors() if id(tensor) not in ids)
    with trace:
        gradients = one_step(engine, views)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        one_step(engine, views)
    optimizer = local_bytes(value for state in engine.optimizer.state.values() for value in state.values())
    return {
        "counts": trace.counts,
        "sent": trace.sent,
        "flops": sum(o.flops for o in trace.operators),
        "weights": local_bytes(weights_of(engine)),
        "gradients": gradients,
        "optimizer": optimizer,
        "peak": trace.peak,
        "profiled": sum(event.name.startswith("c10d::") for event in recorded.events()),
    }


def one_step(engine: Engine, views: Views) -> int:
    """Returns bytes of gradients."""
    engine.forward_backward(views, 0)
    gradients = local_bytes(engine.gradients())
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.1
    engine.step_optimizer()
    return gradients


def live_tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu"]


def weights_of(engine: Engine) -> list[Tensor]:
    """All that a rank holds of weights: DeepSpeed's flat tensors, what it updates, and what is gathered."""
    sharded = getattr(engine, "zero", None)
    parameters = list(engine.method.parameters())
    if sharded is None:
        return parameters
    if engine.stage < 3:
        return [*sharded.bit16_groups_flat, *sharded.single_partition_of_fp32_groups]
    return [
        *(p.ds_tensor for p in parameters),
        *sharded.fp32_partitioned_groups_flat,
        *(p.data for p in parameters if p.data.shape == p.ds_shape),
    ]


@cache
def measured(ranks: int) -> list[list[dict[str, object]]]:
    """All cases of so many ranks, run by the same processes: rank by rank, case by case."""
    return run_ranks(real_steps, ranks, [overrides for number, overrides in CASES if number == ranks], timeout_s=300)


def merged(found: Counter[Collective]) -> Counter[Collective]:
    """A real step does not show which exchanges it waits for."""
    total: Counter[Collective] = Counter()
    for what, number in found.items():
        total[what._replace(of=WEIGHTS if what.of == WAITED else what.of)] += number
    return total


@pytest.mark.distributed
@pytest.mark.parametrize("ranks, overrides", CASES)
def test_a_plan_is_what_the_library_does(ranks, overrides, monkeypatch):
    number = [case for case in CASES if case[0] == ranks].index((ranks, overrides))
    of_ranks = [rank[number] for rank in measured(ranks)]
    # FairScale's ranks own different parameters; a plan is of the one that owns most. All others are alike.
    real = max(of_ranks, key=lambda rank: rank["optimizer"])
    tighten(monkeypatch.setattr)
    planned = simulate(configuration(overrides), ranks)
    for name in ("weights", "gradients", "optimizer", "flops"):
        assert getattr(planned, name) == real[name], name
    assert merged(planned.counts) == real["counts"]
    assert merged(planned.sent) == real["sent"]
    assert sum(real["counts"].values()) == real["profiled"], "a collective that does not pass torch's dispatcher"
    assert planned.peak == pytest.approx(real["peak"], rel=0.03)


def defaults_of_deepspeed() -> dict[str, int]:
    zero._import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = DeepSpeedZeroConfig(stage=3)
    return {name: getattr(config, name) for name in _DEFAULTS}


@pytest.mark.distributed
def test_what_the_adapter_leaves_alone_is_as_deepspeed_has_it():
    assert run_ranks(defaults_of_deepspeed, 1) == [_DEFAULTS]


def follow(reuse: int, prefetch: int) -> list[int]:
    """All-gathers of the third micro-batch of three modules that run forward and backward."""
    coordinator = Coordinator(
        [Parameter(100, 100, False)] * 3, [[0], [1], [2]], prefetch=prefetch, reuse=reuse, live=10**9
    )
    one = [
        (f"{done}{way}", module)
        for way, order in (("forward", (0, 1, 2)), ("backward", (2, 1, 0)))
        for module in order
        for done in ("", "done ")
    ]
    for _ in range(3):
        coordinator.gathers.clear()
        for what, module in [("begin", -1), *one, ("end", -1), ("update", -1)]:
            coordinator.follow(Event(what, module, 0))
    return coordinator.gathers


def test_what_is_used_again_soon_stays_and_what_comes_soon_is_gathered_ahead():
    assert follow(reuse=10**9, prefetch=10**9) == [100, 200]
    assert follow(reuse=10**9, prefetch=0) == [100] * 3
    assert follow(reuse=0, prefetch=0) == [100] * 6
