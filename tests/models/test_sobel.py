"""Sobel's filters before a network's first convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import conv2d

from largescale.config import ModelConfig
from largescale.models.backbones import build_backbone
from largescale.models.sobel import SobelConv2d

NAMES = ["resnet", "resnet18", "regnet_y_400mf", "vgg16_bn", "alexnet_bn"]


def edges(images: torch.Tensor) -> torch.Tensor:
    """Gray, then each filter, one after the other."""
    gray = images.mean(1, keepdim=True)
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=images.dtype)
    return torch.cat([conv2d(gray, one[None, None], padding=1) for one in (across, across.t())], 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_sees_edges_and_nothing_else(name):
    backbone, width = build_backbone(ModelConfig(backbone=name, stem="3x3", depths=[1], width=8, sobel=True))
    [first] = [module for module in backbone.modules() if isinstance(module, SobelConv2d)]
    seen = []
    first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, 32, 32)
    assert backbone.eval()(images).shape == (2, width)
    by_hand = conv2d(edges(images), first.weight, first.bias, first.stride, first.padding)
    torch.testing.assert_close(seen[0], by_hand, rtol=1e-5, atol=1e-5)
    colours = images + torch.tensor([2.0, -1.0, -1.0])[:, None, None]  # of the same gray
    torch.testing.assert_close(backbone(colours), backbone(images), rtol=1e-3, atol=1e-3)
    assert not any("sobel" in key for key in backbone.state_dict())
    assert all(parameter is not first.sobel for parameter in backbone.parameters())


def test_filters_are_there_where_a_network_was_built_without_memory():
    config = ModelConfig(backbone="resnet", depths=[1], width=8, sobel=True)
    whole, _ = build_backbone(config)
    with torch.device("meta"):
        empty, _ = build_backbone(config)
    empty.load_state_dict(copy.deepcopy(whole.state_dict()), assign=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(empty.eval()(images), whole.eval()(images))
