"""Forward passes through a network that is not to be moved by their gradient, such as an adversary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def constant_weights(network: nn.Module) -> Iterator[None]:
    """A graph that is made in here leads to the network's inputs, and not to its parameters: they cost no backward
    pass, and no strategy exchanges gradients of them. To be used inside of a method's `forward`, and not for backbones:
    FSDP2 gathers their blocks one by one, and would take what is seen in here the first time for the rule.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
