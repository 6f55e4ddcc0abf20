"""What each strategy sends in a step, and what it holds between steps: no more than its design needs."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile

from largescale.config import Config, load_config
from largescale.methods import build_method
from largescale.models.backbones import BLOCKS
from largescale.parallel import build_engine
from largescale.parallel.engine import Engine
from tests.conftest import ROOT
from tests.distributed.ranks import run_ranks
from tests.distributed.test_strategies import views_of_step

pytestmark = pytest.mark.distributed

SMALL = ["model.backbone=resnet", "model.stem=3x3s2", "model.depths=[1,1]", "model.width=8",
         "method.freeze_prototypes_steps=1", "train.precision=fp32", "parallel.unit_min_parameters=0"]


def build(strategy: str, overrides: list[str]) -> tuple[Config, Engine]:
    config = load_config(ROOT / "tests" / "strategies.yaml", [f"parallel.strategy={strategy}", *overrides])
    torch.manual_seed(0)
    return config, build_engine(build_method(config), config, torch.device("cpu"))


def one_step(config: Config, engine: Engine, step: int) -> None:
    views = views_of_step(config, step)
    output = engine.forward_backward(views, step)
    engine.update(engine.check(views, output.loss), step=step, lr=0.1, clip=0.0)


def collectives(strategy: str, overrides: list[str]) -> dict[str, int]:
    """Collectives of a step by kind, less those of the method, BatchNorm and the check, which all strategies share."""
    config, engine = build(strategy, [*SMALL, *overrides])
    shared = shared_collectives(config, engine.method)
    for step in range(3):  # lazy set-up is over, prototypes are free, the queue is in use
        one_step(config, engine, step)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        one_step(config, engine, 3)
    counts = Counter(event.name.removeprefix("c10d::").strip("_") for event in recorded.events()
                     if event.name.startswith("c10d::"))
    counts["allgather"] += counts.pop("_allgather_base", 0) + counts.pop("allgather_base", 0)
    counts["reduce_scatter"] += counts.pop("reduce_scatter_base", 0) + counts.pop("_reduce_scatter_base", 0)
    counts.subtract(shared)
    return {name: count for name, count in counts.items() if count}


def shared_collectives(config: Config, method: nn.Module) -> dict[str, int]:
    norms = {part: sum(isinstance(m, _BatchNorm) for m in getattr(method, part).modules())
             for part in ("backbone", "projection")}
    passes = norms["backbone"] * len(config.data.crops) + norms["projection"]
    micro_batches = config.train.accumulate
    return {"allgather": passes * micro_batches,
            "allreduce": (passes + config.method.sinkhorn_iterations) * micro_batches + 1}


UNITS = 2  # residual blocks of the small network
WEIGHTS = 0


@pytest.mark.parametrize("strategy, ranks, overrides, expected", [
    ("ddp", 2, [], {"allreduce": 1}),
    ("ddp", 2, ["train.accumulate=2"], {"allreduce": 1}),
    ("fsdp", 2, [], {"allgather": 1 + 2 * UNITS, "reduce_scatter": 1 + UNITS, "allreduce": 1}),
    ("fsdp", 2, ["parallel.reshard_after_forward=false"],
     {"allgather": 1 + UNITS, "reduce_scatter": 1 + UNITS, "allreduce": 1}),
    ("fsdp", 4, ["parallel.replicate=2"],
     {"allgather": 1 + 2 * UNITS, "reduce_scatter": 1 + UNITS, "allreduce": 1 + 1 + UNITS}),
    ("zero1", 2, [], {}),
    ("zero2", 2, [], {}),
    ("zero3", 2, [], {}),
    ("fairscale", 2, [], {}),
])
def test_collectives_of_a_step(strategy, ranks, overrides, expected):
    for counts in run_ranks(collectives, ranks, strategy, ["optim.name=lars", *overrides]):
        assert counts == expected


def bytes_held(strategy: str) -> tuple[int, int, int]:
    """Bytes of all live tensors between two steps, of those and the gradients after a backward pass, of the weights."""
    before = live_bytes()
    config, engine = build(strategy, ["model.backbone=resnet18", "optim.name=lars", "method.queue=0",
                                      "train.precision=fp32", "method.freeze_prototypes_steps=0"])
    weights = 4 * sum(p.numel() for p in build_method(config).parameters())
    for step in range(2):
        one_step(config, engine, step)
    between = live_bytes() - before
    views = views_of_step(config, 2)
    loss = engine.forward_backward(views, 2).loss
    gradients = engine.gradients()
    after_backward = live_bytes() - before
    del views, loss, gradients
    return between, after_backward, weights


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


assert BLOCKS and dist
