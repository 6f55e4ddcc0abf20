"""Plans of DeepSpeed's and FairScale's strategies against real steps of these libraries.

Covers: largescale/plan/fetching.py, largescale/plan/like_ddp.py, largescale/plan/like_fairscale.py,
largescale/plan/like_zero.py, largescale/plan/like_zero12.py, largescale/plan/like_zero3.py,
largescale/plan/module_calls.py, largescale/plan/stand_in.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from largescale.parallel import zero
from largescale.plan.fetching import Coordinator, Event, Parameter
from largescale.plan.like_zero3 import _DEFAULTS
from largescale.plan.simulate import simulate
from tests.helpers.once import once
from tests.helpers.plans import configuration
from tests.helpers.ranks import run_ranks
from tests.helpers.real_steps import merged, real_steps, tighten

REGNET = ["model.backbone=regnet_y_400mf", "model.stem=3x3s2"]
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


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[list[dict[str, Any]]]]:
    """All cases of so many ranks, run by the same processes: rank by rank, case by case."""

    def compute(ranks: int) -> list[list[dict[str, Any]]]:
        configs = [configuration(overrides) for number, overrides in CASES if number == ranks]
        return run_ranks(real_steps, ranks, configs, timeout_s=600)

    return cache(lambda ranks: once(tmp_path_factory, f"steps-of-stand-ins-{ranks}", lambda: compute(ranks)))


@pytest.mark.distributed
@pytest.mark.parametrize("ranks, overrides", CASES)
def test_a_plan_is_what_the_library_does(measured, ranks, overrides, monkeypatch):
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
