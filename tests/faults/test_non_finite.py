"""Covers: largescale/parallel/precision.py"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.parallel.engine import Engine, StepCheck
from largescale.parallel.strategies import build_engine
from tests.helpers.commands import TINY
from tests.helpers.launcher import run_largescale
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


def poisoned_step(strategy: str, where: str) -> tuple[str, bool]:
    """One step in which rank 1 has a NaN; returns what the check says, and whether the weights are as they were."""
    config = load_config(TINY, ["data.shards=unused", f"parallel.strategy={strategy}"])
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    images = [torch.randn(8 * g.num, 3, g.size, g.size, dtype=torch.float64) for g in config.data.crops]
    views = Views.numbered(images, 8)
    if where == "views" and dist.get_rank() == 1:
        views.images[0][0, 0, 0, 0] = float("nan")
    if where == "loss" and dist.get_rank() == 1:
        forward = engine.method.forward
        engine.method.forward = lambda *batch: (out := forward(*batch))._replace(loss=out.loss * float("inf"))
    loss = engine.forward_backward(views, 0).loss
    check = engine.check(views, loss)
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in engine.method.backbone.parameters()]
    return check.trouble, all(bool(w.isfinite().all()) for w in weights)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("where", ["views", "loss"])
def test_all_ranks_learn_which_rank_is_not_finite(strategy, where):
    for trouble, finite in run_ranks(poisoned_step, 2, strategy, where):
        expected = "input views not finite on rank 1" if where == "views" else "loss not finite on rank 1"
        assert expected in trouble
        assert finite


def fp16_engine() -> tuple[Engine, Views]:
    config = load_config(TINY, ["data.shards=unused", "train.precision=fp16"])
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    return engine, Views.numbered([torch.randn(8 * g.num, 3, g.size, g.size) for g in config.data.crops], 8)


def fp16_step(engine: Engine, views: Views, poison: str = "") -> tuple[StepCheck, bool]:
    """One step; returns its check, and whether the weights are as they were."""
    before = [p.detach().clone() for p in engine.method.parameters()]
    loss = engine.forward_backward(views, 0).loss
    if poison:
        dict(engine.method.named_parameters())[poison].grad.view(-1)[0] = float("nan")
    check = engine.check(views, loss)
    if not check.trouble:
        engine.update(check, step=0, lr=0.1, clip=0.0)
    return check, all(torch.equal(p, old) for p, old in zip(engine.method.parameters(), before, strict=True))


def fp16_steps() -> dict[str, object]:
    """What fp16 does of a loss scale that is far too large, of one that is a little, and of a NaN that stays."""
    engine, views = fp16_engine()
    engine.loss_scale.numbers[0] = 2.0**120
    check, same = fp16_step(engine, views)
    far = check.trouble, check.overflow, float(engine.loss_scale.factor), same
    engine.loss_scale.numbers[0] = 2.0**40
    recovered = 0
    while fp16_step(engine, views)[0].overflow:
        recovered += 1
    engine.loss_scale.numbers[:] = torch.tensor([2.0**16, 7])
    skipped = 0
    # The same parameter on one rank only, so that the others learn of it.
    while (step := fp16_step(engine, views, STAYS_BAD if dist.get_rank() == 1 else ""))[0].overflow:
        skipped += 1
    views.images[1][0, 0, 0, 0] = float("nan") if dist.get_rank() == 0 else 0.0
    engine.loss_scale.numbers[0] = 2.0**16
    in_views = fp16_step(engine, views)[0]
    return {
        "far": far,
        "recovered": recovered,
        "scale": float(engine.loss_scale.factor),
        "skipped": skipped,
        "trouble": step[0].trouble,
        "untouched": step[1],
        "in views": in_views,
    }


STAYS_BAD = "backbone.stages.1.0.conv1.weight"


def test_fp16_finds_its_loss_scale_and_stops_for_what_no_loss_scale_mends():
    for result in run_ranks(fp16_steps, 2):
        assert result["far"] == ("", True, 2.0**119, True)
        assert 5 < result["recovered"] < 40
        # From 2^16 down to 2^-8, then no further.
        assert result["skipped"] == 24
        assert result["trouble"].startswith("gradient not finite on rank 1 (1 of ")
        assert f"nearest to the loss {STAYS_BAD}), at the smallest loss scale of fp16" in result["trouble"]
        assert result["untouched"]
        # A forward pass that is not finite is no matter of the loss scale.
        assert not result["in views"].overflow and "input views not finite on rank 0" in result["in views"].trouble


def test_the_run_stops_before_the_update_and_names_step_and_rank(tiny_overrides, tmp_path):
    overrides = tiny_overrides("optim.name=sgd", "optim.lr=1e38", "train.precision=fp32", "checkpoint.every_steps=1")
    result = run_largescale("pretrain", TINY, *overrides, ranks=2, check=False)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: step ")]
    assert len(lines) == 1 and "not finite on rank" in lines[0]
    assert "Traceback" not in result.stderr.split("error: step")[0]
