"""VICReg in the whole; the loss itself is tested in losses/test_variance_covariance.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.vicreg import VICReg
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.methods.losses.loops import variance_covariance_loop

MINI = ROOT / "tests/methods/mini/vicreg.yaml"
BATCH = 6


def build(*overrides: str) -> VICReg:
    torch.manual_seed(0)
    return build_method(load_config(MINI, list(overrides))).double()


def views() -> Views:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * BATCH, 3, 24, 24, generator=generator, dtype=torch.float64)
    return Views.numbered([images], BATCH)


@pytest.mark.parametrize("weights", [(25, 25, 1), (2, 0, 0), (0, 3, 0), (0, 0, 4)])
def test_loss_and_gradient_equal_the_naive_loop(weights):
    """In training mode: each view has its own batch statistics. No weight is dead."""
    names = ("invariance", "variance", "covariance")
    method = build(*(f"method.{name}={weight}" for name, weight in zip(names, weights, strict=True)))
    batch, parameters = views(), [p for p in method.parameters() if p.requires_grad]
    loss = method(batch, 0).loss
    z = torch.stack([method.projection(method.backbone(view)) for view in batch.images[0].chunk(2)])
    expected = variance_covariance_loop(z, *weights)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_heads_have_the_published_biases():
    linear = [layer for layer in build().projection if isinstance(layer, nn.Linear)]
    assert [layer.bias is not None for layer in linear] == [True, False]


@pytest.mark.parametrize("embedding", [1.0, 0.0])
def test_equal_embeddings_are_called_collapse(embedding):
    """Wherever they are; around 0, directions say nothing."""
    method = build("method.variance=0").eval()
    with torch.no_grad():
        method.projection[1].weight.zero_()
        method.projection[1].bias.fill_(embedding)
    output = method(views(), 0)
    assert float(output.loss.detach()) == pytest.approx(0, abs=1e-12)
    found = method.measures(0.0, output.signs, BATCH)
    assert found["variance"] == pytest.approx(0.99)
    words = said_of(load_config(MINI, ["method.variance=0"]), found)
    assert "(standard deviation 0.01): this looks like collapse" in words and "set method.variance=25" in words
    assert "optim.lr=" in said_of(load_config(MINI), found)


def test_terms_of_the_loss_are_logged_and_a_start_gets_no_warning():
    method = build()
    output = method(views(), 0)
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    total = 25 * found["invariance"] + 25 * found["variance"] + found["covariance"]
    assert total == pytest.approx(float(output.loss.detach()))
    assert said_of(load_config(MINI), found) == ""


def test_small_crops_are_refused():
    with pytest.raises(InputError, match="two views in all with method"):
        build("data.crops=[{num: 2, size: 24}, {num: 2, size: 16}]")
