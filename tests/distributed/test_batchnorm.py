"""Covers: largescale/parallel/batchnorm.py"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from largescale.parallel.batchnorm import SyncBatchNorm, average_statistics, differ_by_rank, synchronize_batchnorm
from tests.helpers.ranks import Counted, run_ranks

pytestmark = pytest.mark.distributed

SHAPES = {"BatchNorm2d": (8, 5, 6, 4), "BatchNorm1d": (8, 5)}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(getattr(nn, kind)(5), nn.Tanh(), getattr(nn, kind)(5)).double()
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return net


def batch(kind: str) -> torch.Tensor:
    # A large offset: sums of squares would cancel.
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1000


def train_step(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    slopes = torch.linspace(-1, 1, 5, dtype=torch.float64).view(1, -1, *[1] * (x.dim() - 2))
    (y * slopes * y.cos()).sum().backward()
    return {
        "y": y.detach(),
        "x_grad": x.grad,
        **{f"grad.{n}": p.grad for n, p in net.named_parameters()},
        **{f"buffer.{n}": b for n, b in net.named_buffers()},
    }


def on_this_rank(kind: str, channels_last: bool) -> tuple[dict[str, torch.Tensor], list[tuple[str, int]]]:
    net = synchronize_batchnorm(network(kind), torch.device("cpu"))
    assert isinstance(net[0], SyncBatchNorm)
    x = batch(kind).chunk(dist.get_world_size())[dist.get_rank()]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with Counted() as counted:
        return train_step(net, x), counted.calls


@pytest.mark.parametrize("kind, channels_last", [("BatchNorm2d", False), ("BatchNorm2d", True), ("BatchNorm1d", False)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_one_process_with_the_whole_batch(kind, channels_last, world_size):
    expected = train_step(network(kind), batch(kind))
    per_rank = run_ranks(on_this_rank, world_size, kind, channels_last)
    for name in expected:
        parts = [results[name] for results, _ in per_rank]
        if name.startswith("grad."):
            whole = torch.stack(parts).sum(0)
        elif name.startswith("buffer."):
            assert all(torch.equal(part, parts[0]) for part in parts)
            whole = parts[0]
        else:
            whole = torch.cat(parts)
        torch.testing.assert_close(whole, expected[name], rtol=1e-9, atol=1e-9)


def test_issues_one_all_gather_forward_and_one_all_reduce_backward():
    for _, calls in run_ranks(on_this_rank, 2, "BatchNorm2d", False):
        gathers = [size for name, size in calls if name.startswith("all_gather")]
        assert gathers == [2 * (2 * 5 + 1)] * 2
        assert [size for name, size in calls if name == "all_reduce"] == [10, 10]
        assert len(calls) == 4


def averaged_on_this_rank() -> tuple[torch.Tensor, torch.Tensor]:
    net = nn.Sequential(nn.BatchNorm2d(3))
    net[0].running_mean.fill_(dist.get_rank())
    net[0].running_var.fill_(10.0 + dist.get_rank())
    average_statistics(net)
    return net[0].running_mean, net[0].running_var


def test_unsynchronised_statistics_are_averaged_before_saving():
    for mean, var in run_ranks(averaged_on_this_rank, 2):
        assert torch.equal(mean, torch.full((3,), 0.5)) and torch.equal(var, torch.full((3,), 10.5))


def equal_on_this_rank() -> bool:
    """Whether statistics that are equal on all ranks stay what they are."""
    torch.manual_seed(0)
    net = nn.BatchNorm2d(1000)
    net.running_mean, net.running_var = torch.randn(1000), torch.rand(1000)
    before = net.running_mean.clone(), net.running_var.clone()
    average_statistics(net)
    return torch.equal(net.running_mean, before[0]) and torch.equal(net.running_var, before[1])


def test_equal_statistics_stay_equal_to_the_last_bit():
    assert run_ranks(equal_on_this_rank, 3) == [True] * 3


def differing_on_this_rank() -> list[bool]:
    groups = [None, dist.new_subgroups(2)[0]]
    shared = [synchronize_batchnorm(network("BatchNorm2d"), torch.device("cpu"), group) for group in groups]
    return [differ_by_rank(net) for net in (*shared, network("BatchNorm2d"), nn.Linear(2, 2))]


def test_statistics_of_fewer_than_all_ranks_differ():
    assert run_ranks(differing_on_this_rank, 4) == [[False, True, True, False]] * 4


def grouped_on_this_rank() -> dict[str, torch.Tensor]:
    net = synchronize_batchnorm(network("BatchNorm2d"), torch.device("cpu"), dist.new_subgroups(2)[0])
    return train_step(net, batch("BatchNorm2d").chunk(4)[dist.get_rank()])


def test_neighbouring_ranks_share_statistics_where_groups_are_smaller_than_the_world():
    per_rank = run_ranks(grouped_on_this_rank, 4)
    for first, half in ((0, 0), (2, 1)):
        expected = train_step(network("BatchNorm2d"), batch("BatchNorm2d").chunk(2)[half])
        for name in ("y", "x_grad"):
            together = torch.cat([per_rank[first][name], per_rank[first + 1][name]])
            torch.testing.assert_close(together, expected[name], rtol=1e-9, atol=1e-9)
