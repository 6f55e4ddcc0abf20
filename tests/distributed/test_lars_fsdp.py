"""Covers: largescale/optim/optimizers.py"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from largescale.config import load_config
from largescale.optim.lars import LARS
from largescale.optim.optimizers import OPTIMIZERS
from tests.helpers.commands import ROOT
from tests.helpers.ranks import Counted, run_ranks
from tests.methods import harness

pytestmark = pytest.mark.distributed

STEPS, BATCH = 10, 8
DENOMINATORS = ("sum_of_norms", "norm_of_sum")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    # 7 and 3 rows do not divide by 2 or 4: uneven and empty shards.
    return nn.Sequential(
        nn.Conv2d(2, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 16, 9), nn.ReLU(), nn.Linear(9, 3)
    ).double()


def optimizer(net: nn.Module, denominator: str) -> LARS:
    weights = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() == 1]
    return LARS(
        [{"params": weights, "weight_decay": 1e-3}, {"params": vectors, "scaled": False}],
        0.7,
        trust_coefficient=0.02,
        trust_denominator=denominator,
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(BATCH, 2, 6, 6, generator=generator, dtype=torch.float64),
        torch.randn(BATCH, 3, generator=generator, dtype=torch.float64),
    )


def train(net: nn.Module, part: slice, denominator: str) -> list[list[tuple[str, int]]]:
    lars, calls = optimizer(net, denominator), []
    for step in range(STEPS):
        x, y = batch(step)
        (net(x[part]) - y[part]).square().mean().backward()
        with Counted() as counted:
            lars.step()
        calls.append(counted.calls)
        lars.zero_grad()
    return calls


def weights_of_this_rank() -> list[tuple[list[torch.Tensor], list[list[tuple[str, int]]]]]:
    return [sharded(denominator) for denominator in DENOMINATORS]


def sharded(denominator: str) -> tuple[list[torch.Tensor], list[list[tuple[str, int]]]]:
    size, rank = dist.get_world_size(), dist.get_rank()
    net = network()
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(net[3], mesh=mesh)
    fully_shard(net, mesh=mesh)
    local = BATCH // size
    calls = train(net, slice(rank * local, (rank + 1) * local), denominator)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    return [p.full_tensor().detach() for p in net.parameters()], calls


@pytest.mark.parametrize("world_size", [2, 4])
def test_ten_steps_under_fsdp_equal_one_process(world_size):
    found = run_ranks(weights_of_this_rank, world_size)
    for way, denominator in enumerate(DENOMINATORS):
        reference = network()
        train(reference, slice(None), denominator)
        for weights, calls in (of_rank[way] for of_rank in found):
            for piece, whole in zip(weights, reference.parameters(), strict=True):
                torch.testing.assert_close(piece, whole.detach(), rtol=1e-10, atol=1e-12)
            # One all-reduce of both norms of the three weight matrices, nothing else.
            assert calls == [[("all_reduce", 6)]] * STEPS


def losses_of_each_optimizer(strategy: str) -> dict[str, list[float]]:
    found = {}
    for name in OPTIMIZERS:
        config = load_config(
            ROOT / "tests" / "strategies.yaml",
            [
                f"parallel.strategy={strategy}",
                f"optim.name={name}",
                "optim.lr=0.05",
                "optim.clip_grad_norm=0",
                "model.backbone=resnet",
                "model.stem=3x3s2",
                "model.depths=[1,1]",
                "model.width=8",
            ],
        )
        found[name] = harness.train(config, 3)["losses"]
    return found


def test_every_optimizer_steps_on_sharded_parameters():
    [sharded], [whole] = (run_ranks(losses_of_each_optimizer, 1, strategy) for strategy in ("fsdp", "ddp"))
    assert set(sharded) == set(OPTIMIZERS) >= {"sgd"}
    for name, losses in sharded.items():
        assert losses == pytest.approx(whole[name], rel=1e-10), name
        assert len(set(losses)) == 3
