from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from largescale.config import load_config
from largescale.methods import build_method
from largescale.parallel import build_engine
from tests.conftest import ROOT, run_python
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def poisoned_step(strategy: str, where: str) -> tuple[str, bool]:
    """One step in which rank 1 has a NaN; returns what the check says, and whether the weights are as they were."""
    config = load_config(ROOT / "tests" / "tiny.yaml", ["data.shards=unused", f"parallel.strategy={strategy}"])
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    views = [torch.randn(8 * g.num, 3, g.size, g.size, dtype=torch.float64) for g in config.data.crops]
    if where == "views" and dist.get_rank() == 1:
        views[0][0, 0, 0, 0] = float("nan")
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


def overflowing_step() -> tuple[str, bool, float, bool]:
    """One fp16 step at a loss scale that is far too large."""
    config = load_config(ROOT / "tests" / "tiny.yaml", ["data.shards=unused", "train.precision=fp16"])
    torch.manual_seed(0)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    engine.loss_scale.numbers[0] = 2.0**120
    views = [torch.randn(8 * g.num, 3, g.size, g.size) for g in config.data.crops]
    before = [p.detach().clone() for p in engine.method.parameters()]
    check = engine.check(views, engine.forward_backward(views, 0).loss)
    engine.update(check, step=0, lr=0.1, clip=0.0)
    same = all(torch.equal(p, old) for p, old in zip(engine.method.parameters(), before, strict=True))
    return check.trouble, check.overflow, float(engine.loss_scale.factor), same


def test_an_fp16_overflow_halves_the_loss_scale_and_passes_the_step_over():
    assert run_ranks(overflowing_step, 2) == [("", True, 2.0**119, True)] * 2


def test_the_run_stops_before_the_update_and_names_step_and_rank(tiny_overrides, tmp_path):
    result = run_python(
        "-m", "largescale", "pretrain", ROOT / "tests" / "tiny.yaml",
        *tiny_overrides("optim.name=sgd", "optim.lr=1e38", "train.precision=fp32", "checkpoint.every_steps=1"),
        ranks=2, check=False,
    )
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: step ")]
    assert len(lines) == 1 and "not finite on rank" in lines[0]
    assert "Traceback" not in result.stderr.split("error: step")[0]
