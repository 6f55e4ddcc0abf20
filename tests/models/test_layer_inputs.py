from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from largescale.models.backbones import build_backbone, feature_map
from largescale.models.layer_inputs import input_of, layer_shapes, layers_of, patterns_of
from tests.methods.harness import mini

BACKBONES = ["resnet", "resnet18", "resnet50_sk", "regnet_y_400mf", "alexnet_bn"]


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_on_top_of_each_other_are_the_backbone_and_own_its_parameters(name):
    config = mini("denoising", f"model.backbone={name}", "model.stem=3x3s2").model
    backbone, _ = build_backbone(config)
    images = torch.randn(2, 3, 32, 32)
    shapes, maps = layer_shapes(config, 32), images
    for (layer, module), shape in zip(layers_of(backbone.eval()).items(), shapes.values(), strict=True):
        assert torch.equal(input_of(backbone, layer, images), maps) and maps.shape[1] == shape.taken
        maps = module(maps)
        assert maps.shape[1] == shape.made
    last = backbone.last_pool(maps) if hasattr(backbone, "last_pool") else maps
    assert torch.equal(last, feature_map(backbone, images))
    method = nn.ModuleDict({"backbone": backbone})
    patterns = [pattern for layer in layers_of(backbone).values() for pattern in patterns_of(method, layer)]
    owners = [sum(fnmatchcase(of, pattern) for pattern in patterns) for of, _ in method.named_parameters()]
    assert set(owners) == {1}


def test_what_lies_below_is_used_as_it_is():
    """In training mode: by running statistics, which are not fed, and without a graph."""
    backbone, _ = build_backbone(mini("denoising").model)
    images, before = torch.randn(4, 3, 24, 24), {name: value.clone() for name, value in backbone.named_buffers()}
    found = input_of(backbone.train(), "stage2", images)
    assert not found.requires_grad
    torch.testing.assert_close(found[:1], input_of(backbone, "stage2", images[:1]))
    assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
    assert all(module.training for module in backbone.modules())
