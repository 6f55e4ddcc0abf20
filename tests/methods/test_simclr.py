"""Covers: largescale/methods/contrastive.py"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.simclr import SimCLR
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

MINI = ROOT / "tests/methods/mini/simclr.yaml"
BATCH = 6


@pytest.fixture
def method() -> SimCLR:
    torch.manual_seed(0)
    return build_method(load_config(MINI)).double().eval()


def views(*, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    return Views.numbered([torch.randn(2 * BATCH, 3, 24, 24, generator=generator, dtype=torch.float64)], BATCH)


def naive_loss(z: torch.Tensor, temperature: float) -> torch.Tensor:
    """Section 2 of the paper, a view at a time; rows are the first views of all images, then the second."""
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        candidates = torch.stack([torch.exp(z[i] @ z[n] / temperature) for n in range(len(z)) if n != i])
        partner = z[(i + len(z) // 2) % len(z)]
        total = total - torch.log(torch.exp(z[i] @ partner / temperature) / candidates.sum())
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_and_gradient_equal_the_naive_loop(method, temperature):
    method.config.temperature = temperature
    batch = views()
    loss = method(batch, 0).loss
    expected = naive_loss(normalize(method.projection(method.backbone(batch.images[0])), dim=1), temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = [p for p in method.parameters() if p.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_equal_embeddings_cost_as_much_as_a_guess_and_are_called_collapse(method):
    with torch.no_grad():
        method.projection[-1].weight.zero_()
        method.projection[-1].bias.fill_(1.0)
    output = method(views(), 0)
    assert float(output.loss.detach()) == pytest.approx(math.log(2 * BATCH - 1))
    row = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert row["embedding_spread"] == pytest.approx(0, abs=1e-9) and row["picked"] < 0.5
    assert "looks like collapse" in method.diagnose(load_config(MINI), row, row)


def test_a_network_at_its_start_gets_no_warning(method):
    output = method.train()(views(), 0)
    row = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert method.diagnose(load_config(MINI), row, row) == "" and 0 <= row["picked"] <= 1


def test_small_temperatures_do_not_overflow(method):
    method.float()
    method.config.temperature = 0.001
    batch = views()
    assert method(batch._replace(images=[batch.images[0].float()]), 0).loss.isfinite()


def test_views_of_two_sizes_are_views_of_the_same_images(method):
    """Two groups of one view each, for augmentations or sizes of their own."""
    batch = views()
    apart = batch._replace(images=list(batch.images[0].split(BATCH)))
    torch.testing.assert_close(method(apart, 0).loss, method(batch, 0).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("crops", ["[{num: 1}]", "[{num: 2}, {num: 1}]"])
def test_other_numbers_of_views_are_refused(crops):
    with pytest.raises(InputError, match=r"data.crops=.* views: expected two views in all with method.name=simclr"):
        load_config(MINI, [f"data.crops={crops}"])
