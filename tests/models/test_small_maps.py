"""Convolutions as matrix products: the same values and gradients as torch's, also under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from largescale.config import ModelConfig
from largescale.models import small_maps
from largescale.models.backbones import build_backbone
from largescale.models.small_maps import SmallMapConv2d, half_width_in_float32, multiply_small_maps


def both(stride: int) -> tuple[nn.Conv2d, SmallMapConv2d]:
    torch.manual_seed(0)
    ordinary = nn.Conv2d(128, 24, 3, stride, 1, bias=False, dtype=torch.float64)
    network = nn.Sequential(ordinary)
    multiply_small_maps(network)
    assert isinstance(network[0], SmallMapConv2d) and network[0].weight is ordinary.weight
    return ordinary, network[0]


@pytest.mark.parametrize("height, width, stride", [(1, 1, 1), (2, 2, 1), (3, 3, 1), (2, 4, 1), (5, 5, 2), (6, 5, 2)])
def test_values_and_gradients_are_those_of_a_convolution(height, width, stride):
    found = []
    for conv in both(stride):
        x = torch.randn(5, 128, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        conv.weight.grad = None
        y = conv(x)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
        found.append((y.detach(), x.grad, conv.weight.grad.clone()))
    for ordinary, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, ordinary, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    conv = SmallMapConv2d(3, 2, 3, 1, 1, bias=False, dtype=torch.float64)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(conv, {"weight": w}, (x,)), (x, conv.weight)
    )


def test_larger_maps_are_convolved():
    ordinary, ours = both(1)
    x = torch.randn(2, 128, 4, 4, dtype=torch.float64)
    assert torch.equal(ours(x), ordinary(x))


@pytest.mark.parametrize("half_width", [False, True])
def test_float32_is_convolved_where_products_are_of_half_width(monkeypatch, half_width):
    monkeypatch.setattr(small_maps, "half_width_in_float32", lambda: half_width)
    ordinary, ours = both(1)
    for dtype, product in ((torch.float32, not half_width), (torch.bfloat16, True), (torch.float64, True)):
        x = torch.randn(2, 128, 2, 2, dtype=dtype)
        y = ours.to(dtype)(x.requires_grad_())
        assert ("Product" in type(y.grad_fn).__name__) == product
        torch.testing.assert_close(y, ordinary.to(dtype)(x))


@pytest.mark.parametrize(
    "maker, capability, half_width",
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_half_width_follows_from_the_maker_and_the_vectors(monkeypatch, tmp_path, maker, capability, half_width):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n\nprocessor\t: 1\nvendor_id\t: x\n")
    monkeypatch.setattr(small_maps, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert half_width_in_float32.__wrapped__() == half_width


def test_autocast_reaches_the_product():
    _, ours = both(1)
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(torch.randn(2, 128, 2, 2))
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_a_network_keeps_its_names_and_its_grouped_and_large_kernels():
    for name, replaced in (("resnet18", 11), ("regnet_y_400mf", 0)):
        network, _ = build_backbone(ModelConfig(backbone=name))
        names = list(network.state_dict())
        multiply_small_maps(network)
        assert list(network.state_dict()) == names
        assert sum(isinstance(module, SmallMapConv2d) for module in network.modules()) == replaced
