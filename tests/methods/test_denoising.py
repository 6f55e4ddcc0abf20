"""Covers: largescale/methods/unexplained.py"""

from __future__ import annotations

import pytest
import torch

from largescale.data.views import Views
from largescale.methods.denoising import Denoising
from largescale.models.backbones import feature_map
from shards.ground.errors import InputError
from tests.helpers.doctor import said_of
from tests.helpers.one_view import BATCH, SIDE, built
from tests.helpers.one_view import random_views as views
from tests.methods.harness import mini


def build(*overrides: str) -> Denoising:
    return built(Denoising, "denoising", *overrides)


def test_the_loss_is_the_mean_square_of_a_loop():
    method, batch = build().eval(), views()
    [whole] = batch.images
    damaged, clean = method.task_views(batch, 3).images
    assert torch.equal(clean, whole)
    errors = []
    for bad, good in zip(damaged, whole.tolist(), strict=True):
        made = method.decoder(feature_map(method.backbone, bad[None]), SIDE)[0].tolist()
        errors += [(made[c][i][j] - good[c][i][j]) ** 2 for c in range(3) for i in range(SIDE) for j in range(SIDE)]
    torch.testing.assert_close(float(method(batch, 3).loss.detach()), sum(errors) / len(errors), rtol=1e-11, atol=0)


@pytest.mark.parametrize("mask", ["pixels", "blocks", "centre"])
def test_hidden_pixels_are_the_mean_in_all_channels_and_others_are_as_they_were(mask):
    [whole] = views().images
    damaged, _ = build("method.noise=0", f"method.mask={mask}").task_views(views(), 3).images
    hidden = damaged == 0
    assert torch.equal(hidden.all(1), hidden.any(1)) and 0.1 < hidden.double().mean() < 0.4
    assert torch.equal(damaged[~hidden], whole[~hidden])


def test_the_best_share_of_a_noisy_pixel_is_that_of_its_variance_that_is_no_noise():
    """Of independent normal pixels with noise of deviation s, a share 1 / (1 + s^2) of what is seen."""
    batch = views(400)
    damaged, whole = build("method.masked=0", "method.noise=0.5").task_views(batch, 3).images
    slope = float((damaged * whole).sum() / damaged.square().sum())
    assert slope == pytest.approx(1 / 1.25, abs=0.005)
    inputs = {"whole": whole[None], "damaged": damaged[None]}
    best, more, less = (
        float(build().loss({"images": f * damaged[None], **inputs}, batch.ids, 0).loss) for f in (0.8, 0.85, 0.75)
    )
    assert best == pytest.approx(0.2, abs=0.005) and best < min(more, less)


def test_images_as_they_were_cost_nothing_and_the_mean_colour_is_called_no_restoration():
    method, batch = build(), views()
    whole = batch.images[0][None]
    inputs = {"whole": whole, "damaged": 0.5 * whole}
    assert float(method.loss({"images": whole, **inputs}, batch.ids, 0).loss) == 0
    output = method.loss({"images": whole.mean((1, 3, 4), keepdim=True).expand_as(whole), **inputs}, batch.ids, 0)
    row = method.measures(float(output.loss), output.signs, BATCH)
    assert row["unexplained"] == pytest.approx(1)
    assert row["input_error"] == pytest.approx(float(whole.square().mean()) / 4)
    config = mini("denoising")
    assert "the decoder gives the mean colour everywhere" in said_of(config, row)
    assert said_of(config, row | {"unexplained": 0.3}) == ""
    assert set(method.panels(config)[0].columns.values()) <= set(row)


def test_hidden_pixels_have_no_noise_and_others_have():
    [whole] = views().images
    noise = build("method.masked=0.3", "method.noise=0.5").task_views(views(), 3).images[0] - whole
    hidden = noise == -whole
    assert torch.equal(hidden.all(1), hidden.any(1)) and 0.2 < hidden.double().mean() < 0.4
    assert float(noise[~hidden].std()) == pytest.approx(0.5, rel=0.05)


def test_what_is_unexplained_does_not_depend_on_how_a_batch_is_split():
    """Over micro-batches or ranks of very different brightness."""
    method, whole = build(), torch.cat([views().images[0], 3 + views(seed=1).images[0]])
    made = whole + torch.randn(whole.shape, dtype=whole.dtype)

    def signs(part: slice) -> dict[str, torch.Tensor]:
        inputs = {"images": made[None, part], "whole": whole[None, part], "damaged": whole[None, part]}
        return method.loss(inputs, torch.arange(len(whole[part])), 0).signs

    halves = [signs(slice(None, BATCH)), signs(slice(BATCH, None))]
    split = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    expected = float((made - whole).square().mean() / whole.var((0, 2, 3), correction=0).mean())
    for found in (split, signs(slice(None))):
        assert method.measures(0.0, found, 10)["unexplained"] == pytest.approx(expected)


def test_it_learns_to_fill_in_what_is_hidden():
    """Images that are black or white: what is hidden is like what is not."""
    method = build("method.noise=0", "train.precision=fp32").float()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.005)
    generator, errors = torch.Generator().manual_seed(0), []
    for step in range(60):
        colours = torch.randn(16, 1, 1, 1, generator=generator).sign().expand(16, 3, SIDE, SIDE)
        output = method(Views([colours], torch.arange(16) + 16 * step), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        errors.append(float(output.loss.detach() / output.signs["input_error"]))
    assert errors[0] > 2 and sorted(errors[-15:])[7] < 0.4


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method.masked=0", "method.noise=0"], "method.masked=0.0: expected above 0, or method.noise above 0"),
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected one group of one view"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        mini("denoising", *overrides)
    assert words in str(refusal.value)
