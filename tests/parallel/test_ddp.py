"""One rank by itself on a CPU goes without buckets, and its steps stay the same to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from largescale.methods import build_method
from largescale.parallel import ddp
from tests.helpers.ranks import run_ranks
from tests.methods.harness import LENGTH, mini, views_of_step, whole


def two_ways(overrides: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State after three steps, without DDP's wrapper and with it."""
    config = mini("byol", "train.precision=fp32", *overrides)
    found = []
    for ranks in (1, 2):
        ddp.world_size = lambda ranks=ranks: ranks
        torch.manual_seed(0)
        engine = ddp.build(build_method(config, LENGTH), config, torch.device("cpu"))
        assert isinstance(engine.wrapped, DistributedDataParallel) == (ranks > 1)
        for step in range(3):
            views = views_of_step(config, step)
            check = engine.check(views, engine.forward_backward(views, step).loss)
            engine.update(check, step=step, lr=config.optim.lr, clip=config.optim.clip_grad_norm)
        found.append({name: whole(value).clone() for name, value in engine.state().items()})
    return found[0], found[1]


@pytest.mark.distributed
@pytest.mark.parametrize("overrides", [[], ["train.accumulate=2"]])
def test_a_rank_by_itself_takes_the_steps_that_ddp_takes(overrides):
    [(plain, wrapped)] = run_ranks(two_ways, 1, overrides)
    assert plain.keys() == wrapped.keys()
    assert any(name.startswith("optimizer.") for name in plain)
    for name, value in plain.items():
        assert torch.equal(value, wrapped[name]), name
