"""Every method's plan against its real step: teachers, queues and passes without a gradient included."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from largescale.config import Config
from largescale.methods import METHODS
from largescale.plan.planner import Request, plan
from largescale.plan.simulate import simulate
from largescale.plan.table import table
from tests.helpers.ranks import run_ranks
from tests.helpers.real_steps import merged, real_steps, tighten
from tests.methods.harness import mini

TEACHER, ALL = "dino", ["ddp", "zero1", "zero2", "zero3", "fairscale"]
CASES = [*((method, "fsdp") for method in METHODS), *((TEACHER, strategy) for strategy in ALL)]
"""Every method; and under every strategy one with a teacher, state, and a last layer in float32."""


def config_of(method: str, strategy: str) -> Config:
    return mini(method, "train.precision=fp32", f"parallel.strategy={strategy}")


@cache
def measured() -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each rank did in a step of every method under every strategy."""
    found = run_ranks(real_steps, 2, [config_of(*case) for case in CASES], timeout_s=600)
    return [dict(zip(CASES, of_rank, strict=True)) for of_rank in found]


@pytest.mark.distributed
@pytest.mark.parametrize("method, strategy", CASES)
def test_a_plan_is_what_a_real_step_does(method, strategy, monkeypatch):
    # FairScale's ranks own different parameters; a plan is of the one that owns most.
    real = max((of_rank[method, strategy] for of_rank in measured()), key=lambda found: found["optimizer"])
    tighten(monkeypatch.setattr)
    planned = simulate(config_of(method, strategy), 2)
    for name in ("weights", "gradients", "optimizer", "flops"):
        assert getattr(planned, name) == real[name], name
    assert merged(planned.counts) == real["counts"]
    assert merged(planned.sent) == real["sent"]
    # Memory of networks this small is mostly that of single operators; test_stand_ins.py is stricter on larger ones.
    assert planned.peak == pytest.approx(real["peak"], rel=0.1)


def test_a_plan_says_how_many_parameters_take_a_gradient():
    found = plan(mini("dino", "train.precision=fp32"), Request(2))
    assert found["parameters"] == 2 * found["trained"] > 0
    assert f"({found['trained'] / 1e6:,.1f} M take a gradient)" in table(found)
    assert "take a gradient" not in table(plan(mini("swav", "train.precision=fp32"), Request(2)))
