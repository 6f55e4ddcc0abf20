from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.methods import build_method
from largescale.models.backbones import build_backbone
from largescale.models.initialise import materialise
from largescale.models.layer_norm import use_layer_norm
from tests.methods.harness import mini


def test_no_batchnorm_is_left_and_names_stay():
    backbone, _ = build_backbone(mini("cpc").model)
    before = set(dict(backbone.named_parameters()))
    use_layer_norm(backbone)
    assert set(dict(backbone.named_parameters())) == before
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())


def test_an_image_does_not_know_the_others():
    backbone, _ = build_backbone(mini("cpc").model)
    use_layer_norm(backbone)
    images = torch.randn(4, 3, 24, 24)
    torch.testing.assert_close(backbone(images)[:1], backbone(images[:1]))


def test_weights_that_no_rank_ever_held_whole_begin_as_others_do():
    method = build_method(mini("cpc"), on_meta=True)
    materialise(method, torch.device("cpu"), 0)
    norms = [module for module in method.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()
