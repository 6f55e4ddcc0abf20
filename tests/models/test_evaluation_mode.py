from __future__ import annotations

import torch
from torch import nn

from largescale.models.evaluation_mode import running_statistics_used


def test_an_output_does_not_depend_on_the_batch_and_statistics_stay():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval())
    network(torch.randn(8, 3))
    images, before = torch.randn(5, 3), {name: value.clone() for name, value in network.state_dict().items()}
    with running_statistics_used(network.modules()):
        together, alone = network(images), network(images[:1])
    torch.testing.assert_close(together[:1], alone)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [network[1].training, network[2].training] == [True, False]
