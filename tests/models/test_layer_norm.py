from __future__ import annotations

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.methods import build_method
from largescale.models.backbones import _RESIDUAL, _last_norm, build_backbone
from largescale.models.initialise import materialise
from largescale.models.layer_norm import ImageLayerNorm
from largescale.parallel.strategies import build_engine
from tests.helpers.ranks import run_ranks
from tests.methods.harness import mini, views_of_step


def test_no_batchnorm_is_left_and_names_stay():
    before, _ = build_backbone(mini("cpc", "model.norm=batch").model)
    backbone, _ = build_backbone(mini("cpc").model)
    assert set(dict(backbone.named_parameters())) == set(dict(before.named_parameters()))
    assert not any(isinstance(module, _BatchNorm) for module in backbone.modules())


def test_an_image_does_not_know_the_others():
    backbone, _ = build_backbone(mini("cpc").model)
    images = torch.randn(4, 3, 24, 24)
    torch.testing.assert_close(backbone(images)[:1], backbone(images[:1]))


def test_weights_that_no_rank_ever_held_whole_begin_as_others_do():
    method = build_method(mini("cpc"), on_meta=True)
    materialise(method, torch.device("cpu"), 0)
    norms = [module for module in method.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()


@pytest.mark.parametrize("on_meta", [False, True])
def test_residual_blocks_start_as_their_shortcuts_if_asked(on_meta):
    method = build_method(mini("cpc", "model.zero_init_residual=true"), on_meta=on_meta)
    if on_meta:
        materialise(method, torch.device("cpu"), 0)
    blocks = [module for module in method.modules() if isinstance(module, _RESIDUAL)]
    assert blocks
    for block in blocks:
        norm = _last_norm(block)
        assert isinstance(norm, ImageLayerNorm) and not norm.weight.any()


def test_half_precision_goes_in_and_out_and_float32_is_in_between():
    norm, x = ImageLayerNorm(4), 3 + torch.randn(2, 4, 3, 3)
    torch.nn.init.uniform_(norm.weight)
    expected = (x - x.mean((1, 2, 3), keepdim=True)) / x.var((1, 2, 3), correction=0, keepdim=True).add(1e-5).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    half = x.bfloat16()
    assert torch.equal(norm(half), norm(half.float()).bfloat16())


def scales_in_forward() -> set[tuple[torch.dtype, torch.dtype]]:
    """Types of scales, and of what is scaled, as the forward pass of FSDP2 in bf16 has them."""
    config = mini("cpc", "parallel.strategy=fsdp", "train.precision=bf16", "parallel.unit_min_parameters=0")
    engine, seen = build_engine(build_method(config), config, torch.device("cpu")), []
    for module in engine.method.modules():
        if isinstance(module, ImageLayerNorm):
            module.register_forward_pre_hook(lambda norm, inputs: seen.append((norm.weight.dtype, inputs[0].dtype)))
    engine.forward_backward(views_of_step(config, 0), 0)
    return set(seen)


@pytest.mark.distributed
def test_scales_stay_in_float32_under_fsdp_in_bf16():
    assert run_ranks(scales_in_forward, 1) == [{(torch.float32, torch.bfloat16)}]
