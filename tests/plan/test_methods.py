"""Every method's plan against its real step: teachers, queues and passes without a gradient included.

Covers: largescale/plan/phase.py, largescale/plan/stages.py
"""

from __future__ import annotations

from typing import Any

import pytest

from largescale.config import Config
from largescale.methods import METHODS
from largescale.methods.pcl import PCL
from largescale.plan.planner import Request, plan
from largescale.plan.simulate import simulate
from largescale.plan.table import table
from shards.ground.errors import InputError
from tests.helpers.once import once
from tests.helpers.ranks import run_ranks
from tests.helpers.real_steps import merged, real_steps, tighten
from tests.methods.harness import mini

TEACHER, ADVERSARY, IN_STAGES = "dino", "context_encoder", "artifacts"
ALL = ["ddp", "zero1", "zero2", "zero3", "fairscale"]
CASES = [
    *((method, "fsdp") for method in METHODS),
    *((method, strategy) for method in (TEACHER, ADVERSARY) for strategy in ALL),
    (IN_STAGES, "ddp"),
]
"""Every method; and under every strategy one with a teacher, state, and a last layer in float32, and one with several
objectives per step; one whose first steps have another objective than the last ones.
"""


def config_of(method: str, strategy: str) -> Config:
    return mini(method, "train.precision=fp32", f"parallel.strategy={strategy}")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each rank did in a step of every method under every strategy."""

    def compute() -> list[list[dict[str, Any]]]:
        return run_ranks(real_steps, 2, [config_of(*case) for case in CASES], timeout_s=600)

    found = once(tmp_path_factory, "steps-of-methods", compute)
    return [dict(zip(CASES, of_rank, strict=True)) for of_rank in found]


@pytest.mark.distributed
@pytest.mark.parametrize("method, strategy", CASES)
def test_a_plan_is_what_a_real_step_does(measured, method, strategy, monkeypatch):
    # FairScale's ranks own different parameters; a plan is of the one that owns most.
    real = max((of_rank[method, strategy] for of_rank in measured), key=lambda found: found["optimizer"])
    tighten(monkeypatch.setattr)
    planned = simulate(config_of(method, strategy), 2)
    for name in ("weights", "gradients", "optimizer", "flops"):
        assert getattr(planned, name) == real[name], name
    for planned_of, real_of in ((planned.counts, real["counts"]), (planned.sent, real["sent"])):
        if (method, strategy) == (ADVERSARY, "zero3"):
            # DeepSpeed compares the order of modules between ranks when it differs from that of the pass before.
            real_of = {what: number for what, number in real_of.items() if what.kind != "broadcast"}
        assert merged(planned_of) == real_of
    # Memory of networks this small is mostly that of single operators; test_stand_ins.py is stricter on larger ones.
    assert planned.peak == pytest.approx(real["peak"], rel=0.1)


def test_a_plan_says_how_many_parameters_take_a_gradient():
    found = plan(mini("dino", "train.precision=fp32"), Request(2))
    assert found["parameters"] == 2 * found["trained"] > 0
    assert f"({found['trained'] / 1e6:,.1f} M take a gradient)" in table(found)
    assert "take a gradient" not in table(plan(mini("swav", "train.precision=fp32"), Request(2)))


def test_a_plan_is_of_as_many_images_as_there_are():
    """Of a bank, each rank holds a row for every second image."""
    config = mini("pirl", "train.precision=fp32")
    small, large = (simulate(config, 2, images) for images in (1_000, 101_000))
    assert large.buffers - small.buffers == 50_000 * config.method.embedding * 4
    with pytest.raises(InputError, match=r"method.max_bank_gb=16: rows of 8 numbers for 1,000,000,000,000 images"):
        simulate(config, 2, 10**12)


def test_a_plan_of_a_step_that_looks_for_small_clusters():
    """What is small is not known without the numbers."""
    planned = simulate(mini("odc", "train.precision=fp32", "method.centroids_every=1"), 2)
    assert planned.flops > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3", "fairscale"])
def test_offline_phases_are_part_of_a_plan(strategy):
    overrides = [f"parallel.strategy={strategy}", "method.warmup_epochs=1", "method.recluster_epochs=1"]
    overrides += ["train.steps=0", "train.epochs=3"]
    config = mini("pcl", "train.precision=fp32", *overrides, "evaluate.batch=10")
    small, large = (plan(config, Request(2, images=images)) for images in (1_000, 101_000))
    assert small["offline_phases"]["count"] == 2, "one before each epoch but the first"
    # 50 and 5050 batches of 10 images on each of 2 ranks.
    assert large["offline_phases"]["seconds"] == pytest.approx(101 * small["offline_phases"]["seconds"])
    for found in (small, large):
        seconds = found["steps"] * found["seconds"]["step"] + 2 * found["offline_phases"]["seconds"]
        assert found["hours"] == pytest.approx(seconds / 3600)
        assert f"hours for 2 offline phases, {found['offline_phases']['seconds']:,.1f} s each" in table(found)
    held = [1e9 * found["memory_gb"]["peak of an offline phase"] for found in (small, large)]
    # Of 50,000 images more on a rank: embeddings or what k-means takes, and the clusters of each image.
    least = 50_000 * (config.method.embedding + len(config.method.clusters)) * 4
    assert held[1] - held[0] >= least
    for kept, images in zip(held, (1_000, 101_000), strict=True):
        # Here it is that of a single rank, so of half of the images.
        assert kept > PCL.phase_bytes(config, images // 2) > 72 * images // 2, "what k-means takes is part of it"
    assert "offline" not in table(plan(mini("mocov2", "train.precision=fp32"), Request(2)))


def test_a_phase_that_sums_holds_as_much_for_any_number_of_images():
    config = mini("colorization", "train.precision=fp32", "train.steps=10", "evaluate.batch=4")
    small, large = (simulate(config, 2, images) for images in (1_000, 101_000))
    assert small.phase is not None and large.phase is not None
    assert large.phase.held == small.phase.held and large.phase.calls == 101 * small.phase.calls
