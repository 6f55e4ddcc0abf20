"""Covers: largescale/methods/contrastive.py"""

from __future__ import annotations

import math

import pytest
import torch

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.simclr import SimCLR
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.methods.losses.loops import nt_xent_loop

MINI = ROOT / "tests/methods/mini/simclr.yaml"
BATCH = 6


@pytest.fixture
def method() -> SimCLR:
    torch.manual_seed(0)
    return build_method(load_config(MINI)).double().eval()


def views(*, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    return Views.numbered([torch.randn(2 * BATCH, 3, 24, 24, generator=generator, dtype=torch.float64)], BATCH)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_and_gradient_equal_the_naive_loop(method, temperature):
    method.config.temperature = temperature
    batch = views()
    loss = method(batch, 0).loss
    expected = nt_xent_loop(method.projection(method.backbone(batch.images[0])).unflatten(0, (2, -1)), temperature)
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
    assert "looks like collapse" in said_of(load_config(MINI), row)


def test_a_network_at_its_start_gets_no_warning(method):
    output = method.train()(views(), 0)
    row = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert said_of(load_config(MINI), row) == "" and 0 <= row["picked"] <= 1


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


def test_every_view_of_multi_crop_picks_each_other_view_of_its_image(method):
    """The small one too; VISSL's loss."""
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    batch = views()._replace(images=[*views().images, small])
    z = torch.cat([method.backbone(group) for group in batch.images])
    expected = nt_xent_loop(method.projection(z).unflatten(0, (3, -1)), method.config.temperature)
    output = method(batch, 0)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    assert output.evidence["embeddings"].shape == (3, BATCH, 8)


def test_the_loss_of_equal_views_counts_views_and_images():
    references = SimCLR.loss_references(load_config(MINI, ["train.accumulate=2"]))
    assert references["all views alike"] == pytest.approx(math.log(1 + 3 * (16 / 2 - 1)))


def test_the_head_of_version_2_has_three_layers():
    head = build_method(load_config(MINI, ["method.hidden=[16, 16]"])).projection
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert {"0.weight", "1.bias", "4.bias", "7.weight"} <= trained and not {"0.bias", "6.bias", "7.bias"} & trained


def test_a_loss_over_one_image_is_refused():
    batch = ["train.global_batch=8", "data.streams=1"]
    with pytest.raises(InputError, match=r"train.global_batch=8: expected two images or more that the loss spans"):
        load_config(MINI, [*batch, "train.accumulate=8"])
    load_config(MINI, [*batch, "train.accumulate=8", "train.loss_spans=global_batch"])


def test_one_view_is_refused():
    with pytest.raises(InputError, match=r"data.crops=1 view: expected two or more views with method.name=simclr"):
        load_config(MINI, ["data.crops=[{num: 1}]"])
