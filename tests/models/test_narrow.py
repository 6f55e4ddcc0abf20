"""Strided 1x1 convolutions of few channels, whose gradient crashed in oneDNN: the same values, and no crash."""

from __future__ import annotations

import torch
from torch import nn

from largescale.models.narrow import NarrowConv2d, pick_in_narrow


def test_values_and_gradients_are_those_of_a_convolution():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.Conv2d(16, 16, 1, 2, bias=False))
    weight, wide = network[0].weight, network[1]
    pick_in_narrow(network)
    assert isinstance(network[0], NarrowConv2d) and network[0].weight is weight and network[1] is wide
    x = torch.randn(4, 8, 57, 56).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = network[0](x)
    assert y.shape == (4, 16, 29, 28) and y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    exact = nn.functional.conv2d(exact_x, exact_weight, stride=2)
    exact.backward(grad.double())
    torch.testing.assert_close(y.detach().double(), exact.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-4)
