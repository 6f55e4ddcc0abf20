"""What is zero stays zero in training, and all else moves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from largescale.models.keep_zeros import keep_zeros


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
def test_zeros_stay_and_others_move(optimizer):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    kept = torch.rand(network[0].weight.shape) < 0.4
    with torch.no_grad():
        network[0].weight.mul_(kept)
    keep_zeros(network)
    before = {name: value.clone() for name, value in network.named_parameters()}
    training = optimizer(
        network.parameters(), lr=0.1, weight_decay=0.1, **{"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    )
    for _ in range(4):
        training.zero_grad()
        network(torch.randn(5, 3, 8, 8)).square().sum().backward()
        training.step()
    assert not network[0].weight[~kept].any()
    assert (network[0].weight != before["0.weight"])[kept].all()
    assert all(not torch.equal(value, before[name]) for name, value in network.named_parameters() if name != "1.bias")
    assert network[1].bias.any()  # zeros at first, and no kernel
