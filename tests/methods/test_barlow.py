"""Barlow Twins in the whole; the loss itself is tested in losses/test_cross_correlation.py.

Covers: largescale/methods/redundancy.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from largescale.config import load_config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.barlow import BarlowTwins
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.helpers.ranks import run_ranks
from tests.methods.losses.loops import cross_correlation_loop

MINI = ROOT / "tests/methods/mini/barlow.yaml"
BATCH = 6


def build(*overrides: str) -> BarlowTwins:
    torch.manual_seed(0)
    return build_method(load_config(MINI, list(overrides))).double()


def views(batch: int = BATCH) -> Views:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, batch, 3, 24, 24, generator=generator, dtype=torch.float64)
    return Views.numbered([images.flatten(0, 1)], batch)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.1])
def test_loss_and_gradient_equal_the_naive_loop(off_diagonal):
    """In training mode: each view has its own batch statistics. No option of the loss is dead."""
    method, batch = build(f"method.off_diagonal={off_diagonal}"), views()
    parameters = [p for p in method.parameters() if p.requires_grad]
    loss = method(batch, 0).loss
    z = torch.stack([method.projection(method.backbone(view)) for view in batch.images[0].chunk(2)])
    expected = cross_correlation_loop(z, off_diagonal)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def gradient_of_this_rank(_: str) -> Any:
    """Of the projection's last layer, averaged over ranks as every strategy does. BatchNorm stands still."""
    method, whole = build().eval(), views(8)
    ranks, images = dist.get_world_size(), whole.images[0].unflatten(0, (2, -1))
    own = images.unflatten(1, (ranks, -1))[:, dist.get_rank()]
    loss = method(Views.numbered([own.flatten(0, 1)], own.shape[1]), 0).loss
    loss.backward()
    gradient = method.projection[-1].weight.grad / ranks
    dist.all_reduce(gradient)
    return gradient


@pytest.mark.distributed
def test_the_gradient_is_not_divided_by_the_number_of_ranks():
    """As it is where an all-reduce of correlations is no part of the graph; ranks have other images."""
    [alone], [together, _] = run_ranks(gradient_of_this_rank, 1, ""), run_ranks(gradient_of_this_rank, 2, "")
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_the_head_has_no_biases():
    layers = list(build().projection)
    assert [layer.bias is None for layer in layers if isinstance(layer, nn.Linear)] == [True, True]
    assert isinstance(layers[-1], nn.Linear)  # the standardisation behind it belongs to the loss


def test_terms_of_the_loss_are_logged_and_a_start_gets_no_warning():
    method = build()
    output = method(views(), 0)
    found = method.measures(float(output.loss.detach()), output.signs, BATCH)
    assert found["diagonal"] + 0.1 * found["off_diagonal"] == pytest.approx(float(output.loss.detach()))
    assert said_of(load_config(MINI), found) == ""


def test_equal_embeddings_are_called_collapse():
    method = build("method.off_diagonal=0").eval()
    with torch.no_grad():
        method.projection[1].weight.zero_()
        method.projection[1].bias.fill_(1.0)
    output = method(views(), 0)
    assert float(output.loss.detach()) == pytest.approx(8)  # correlations of 0
    found = method.measures(8.0, output.signs, BATCH)
    words = said_of(load_config(MINI, ["method.off_diagonal=0"]), found)
    assert "looks like collapse" in words and "set method.off_diagonal=0.0051" in words
    assert "optim.lr=" in said_of(load_config(MINI), found)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.crops=[{num: 2, size: 24}, {num: 2, size: 16}]"], "data.crops=4 views: expected two views in all"),
        (["train.global_batch=1", "data.streams=1"], "train.global_batch=1: expected two images or more"),
        (["train.accumulate=16"], "train.global_batch=16: expected two images or more that the loss spans"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        build(*overrides)
    assert words in str(refusal.value)


def test_a_loss_over_the_global_batch_may_have_micro_batches_of_one_image():
    assert build("train.accumulate=16", "train.loss_spans=global_batch").config.off_diagonal == 0.1


def test_what_embeddings_have_in_common_is_no_collapse():
    """The loss does not see it, so training leaves it as it happens to be."""
    method, z = build(), torch.randn(2, 512, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = {"embeddings": torch.stack([z[0], z[0] + 0.1 * z[1]]) + 100}
    output = method.loss(inputs, torch.arange(512), 0)
    found = method.measures(float(output.loss), output.signs, 512)
    assert said_of(load_config(MINI), found) == ""
    assert found["effective_rank"] > 7 and found["embedding_std"] > 0.9
