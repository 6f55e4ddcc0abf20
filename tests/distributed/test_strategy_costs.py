"""What each strategy sends in a step, and what it holds between steps: no more than its design needs.

Covers: largescale/parallel/engine.py
"""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile

from largescale.config import Config, load_config
from largescale.methods import build_method
from largescale.parallel.engine import Engine
from largescale.parallel.strategies import build_engine
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step

pytestmark = pytest.mark.distributed

SMALL = [
    "model.backbone=resnet",
    "model.stem=3x3s2",
    "model.depths=[1,1]",
    "model.width=8",
    "method.freeze_prototypes_steps=1",
    "train.precision=fp32",
    "parallel.unit_min_parameters=0",
]


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
    counts = Counter(
        event.name.removeprefix("c10d::").strip("_") for event in recorded.events() if event.name.startswith("c10d::")
    )
    counts["allgather"] += counts.pop("_allgather_base", 0) + counts.pop("allgather_base", 0)
    counts["reduce_scatter"] += counts.pop("reduce_scatter_base", 0) + counts.pop("_reduce_scatter_base", 0)
    counts.subtract(shared)
    return {name: count for name, count in counts.items() if count}


def shared_collectives(config: Config, method: nn.Module) -> dict[str, int]:
    norms = {
        part: sum(isinstance(m, _BatchNorm) for m in getattr(method, part).modules())
        for part in ("backbone", "projection")
    }
    passes = norms["backbone"] * len(config.data.crops) + norms["projection"]
    micro_batches = config.train.accumulate
    return {
        "allgather": passes * micro_batches,
        "allreduce": (passes + config.method.sinkhorn_iterations) * micro_batches + 1,
    }


UNITS = 2  # residual blocks of the small network; the rest is one unit more
SIZES = 2  # blocks run once a crop size, so FSDP2 gathers them for each, forward and backward
PARAMETERS = 25
GROUPS = 3  # of parameters: weights; biases and normalisation; prototypes
LARS, NORMALIZE = 1, 1


COLLECTIVES = [
    ("ddp", 2, [], {"allreduce": 1}),
    ("ddp", 2, ["train.accumulate=2"], {"allreduce": 1}),
    ("fsdp", 2, [], {"allgather": 1 + 2 * SIZES * UNITS, "reduce_scatter": 1 + UNITS, "allreduce": LARS}),
    (
        "fsdp",
        2,
        ["parallel.reshard_after_forward=false"],
        {"allgather": 1 + SIZES * UNITS, "reduce_scatter": 1 + UNITS, "allreduce": LARS},
    ),
    (
        "fsdp",
        4,
        ["parallel.replicate=2"],
        {"allgather": 1 + 2 * SIZES * UNITS, "reduce_scatter": 1 + UNITS, "allreduce": LARS + 1 + UNITS},
    ),
    # Gradients are exchanged in the last micro-batch alone, however many there are.
    (
        "fsdp",
        2,
        ["train.accumulate=4"],
        {"allgather": 4 * (1 + 2 * SIZES * UNITS), "reduce_scatter": 1 + SIZES * UNITS, "allreduce": LARS},
    ),
    # Weights and prototypes are two groups, so LARS has two exchanges of norms.
    ("zero1", 2, [], {"allreduce": 1 + 2 * LARS + NORMALIZE, "allgather": GROUPS}),
    ("zero1", 2, ["train.accumulate=2"], {"allreduce": 1 + 2 * LARS + NORMALIZE, "allgather": GROUPS}),
    ("zero1", 2, ["method.freeze_prototypes_steps=100"], {"allreduce": 1 + LARS, "allgather": GROUPS}),
    ("zero2", 2, [], {"allreduce": 1 + 2 * LARS + NORMALIZE, "allgather": GROUPS}),
    # Stage 2 cannot keep whole gradients, so it reduces every micro-batch.
    ("zero2", 2, ["train.accumulate=2"], {"allreduce": 2 + 2 * LARS + NORMALIZE, "allgather": GROUPS}),
    ("fairscale", 2, [], {"reduce": PARAMETERS, "broadcast": 2}),
    ("fairscale", 4, [], {"reduce": PARAMETERS, "broadcast": 4}),
    ("fairscale", 2, ["train.accumulate=2"], {"reduce": PARAMETERS, "broadcast": 2}),
]
"""Strategy, ranks, overrides, and collectives of a step."""


def counted(cases: list[tuple[str, list[str]]]) -> list[dict[str, int]]:
    return [collectives(strategy, ["optim.name=lars", *overrides]) for strategy, overrides in cases]


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives_of_a_step(ranks):
    """All cases of so many ranks are run by the same processes, which start once."""
    cases = [(strategy, overrides) for strategy, number, overrides, _ in COLLECTIVES if number == ranks]
    expected = [counts for _, number, _, counts in COLLECTIVES if number == ranks]
    for found in run_ranks(counted, ranks, cases, timeout_s=600):
        for case, counts, right in zip(cases, found, expected, strict=True):
            assert counts == right, case


def test_zero3_gathers_layer_by_layer_and_reduces_once():
    own_norms = 3  # DeepSpeed's own overflow check and gradient norm cannot be switched off in stage 3
    for [counts] in run_ranks(counted, 2, [("zero3", [])]):
        assert counts.keys() == {"allgather", "allreduce", "reduce_scatter"}
        assert counts["reduce_scatter"] == 1
        assert counts["allreduce"] == 2 * LARS + NORMALIZE + own_norms


def bytes_held(strategy: str) -> tuple[int, int, int]:
    """Bytes of all live tensors between two steps, of those and the gradients after a backward pass, of the weights."""
    before = live_bytes()
    config, engine = build(
        strategy,
        [
            "model.backbone=resnet18",
            "optim.name=lars",
            "method.queue=0",
            "train.precision=fp32",
            "method.freeze_prototypes_steps=0",
        ],
    )
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


@pytest.mark.parametrize(
    "strategy, between, gradients",
    [
        ("ddp", lambda ranks: 2 + 1, lambda ranks: 0),  # weights, momentum, and gradient buckets that stay
        ("fsdp", lambda ranks: 2 / ranks, lambda ranks: 1 / ranks),
        ("zero1", lambda ranks: 1 + 2 / ranks, lambda ranks: 1 / ranks),  # weights; own fp32 weights and momentum
        ("zero2", lambda ranks: 1 + 2 / ranks, lambda ranks: 1 / ranks),
        ("zero3", lambda ranks: 1 + 4 / ranks, lambda ranks: 0),  # gradient bucket; weights twice, momentum, gradients
        ("fairscale", lambda ranks: 1 + 1 / ranks, lambda ranks: 1 / ranks),
    ],
)
def test_memory_falls_with_the_ranks_where_it_should(strategy, between, gradients):
    for ranks in (2, 4):
        held = run_ranks(bytes_held, ranks, strategy)
        weights = held[0][2]
        mean_between = sum(row[0] for row in held) / ranks / weights
        mean_after = sum(row[1] for row in held) / ranks / weights
        assert mean_between == pytest.approx(between(ranks), rel=0.05)
        # After a backward pass ZeRO-1 and 2 also hold what has not been freed of the last micro-batch's buffers.
        slack = 0.25 if strategy in ("zero1", "zero2") else 0.05
        assert mean_between + gradients(ranks) - 0.05 < mean_after < mean_between + gradients(ranks) + slack
