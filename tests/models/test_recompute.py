from __future__ import annotations

import copy

import pytest
import torch

from largescale.config import ModelConfig
from largescale.models.backbones import build_backbone
from largescale.models.recompute import recompute_activations
from shards.ground.errors import InputError


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_backbone(ModelConfig(backbone="resnet", stem="3x3s2", depths=[2, 1], width=4))[0].double()


def train_step(backbone: torch.nn.Module) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    for step in range(2):
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (backbone(x).square().sum() + backbone(x[..., :8, :8]).sum()).backward()
    return [p.grad for p in backbone.parameters()], dict(backbone.named_buffers())


def test_recomputed_blocks_change_neither_gradients_nor_statistics():
    plain = small()
    recomputed = copy.deepcopy(plain)
    recompute_activations(recomputed, [1, 2])
    forwards = []
    recomputed.stages[0][0].conv1.register_forward_hook(lambda *_: forwards.append(1))
    grads, buffers = train_step(plain)
    own_grads, own_buffers = train_step(recomputed)
    assert len(forwards) == 2 * 2 * 2  # steps, sizes, forward and again
    for own, expected in zip(own_grads, grads, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=0)
    assert own_buffers.keys() == buffers.keys() and len(buffers) > 10
    assert all(torch.equal(own_buffers[name], buffers[name]) for name in buffers)


def test_without_gradients_nothing_is_kept_or_computed_again():
    backbone = small().eval()
    recompute_activations(backbone, [1])
    with torch.no_grad():
        assert not backbone(torch.zeros(1, 3, 16, 16, dtype=torch.float64)).requires_grad


def test_a_stage_that_is_not_there():
    with pytest.raises(InputError, match="expected stages from 1 to 2"):
        recompute_activations(small(), [3])


@pytest.mark.parametrize("name, count", [("resnet18", 4), ("regnet_y_400mf", 4)])
def test_torchvision_backbones_have_stages(name, count):
    backbone, _ = build_backbone(ModelConfig(backbone=name))
    recompute_activations(backbone, list(range(1, count + 1)))
    backbone(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
