"""Covers: largescale/methods/unexplained.py"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from largescale.config import Config
from largescale.data.length import Length
from largescale.data.task_views import masks
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.methods.denoising import Denoising
from largescale.methods.unexplained import missing_in
from largescale.models.backbones import feature_map
from largescale.models.layer_inputs import layers_of
from largescale.observe.doctor import judge
from largescale.optim.roles import MAIN
from largescale.parallel.strategies import build_engine
from shards.ground.errors import InputError
from tests.helpers.doctor import said_of
from tests.helpers.one_view import BATCH, SIDE, built
from tests.helpers.one_view import random_views as views
from tests.helpers.ranks import run_ranks
from tests.methods.harness import mini, views_of_step, whole

STACKED = ["method.layers=one_by_one"]


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


def test_the_loss_of_a_layer_is_that_of_a_loop():
    """Images one by one, in evaluation mode; places of maps are hidden in all channels."""
    method, batch = build(*STACKED).eval(), views()
    assert method.objectives == ("stem", "stage1", MAIN)
    for objective, name in zip(method.objectives, ("stem", "stage1", "stage2"), strict=True):
        total, hidden = 0.0, 0
        for number, image in enumerate(batch.images[0]):
            maps = image[None]
            for other, layer in layers_of(method.backbone).items():
                if other == name:
                    break
                maps = layer(maps)
            own = batch.ids[number : number + 1]
            if name == "stem":
                damaged = method.task_views(Views([maps], own), 3).images[0]
            else:
                dropped = masks.entries(own, method.config.masked, maps.shape[-1], seed=0, step=3)
                damaged = torch.where(dropped, 0, maps)
                hidden += int(dropped.sum())
            made = method.decoders[name](layers_of(method.backbone)[name](damaged), maps.shape[-1])
            total += float((made - maps).square().mean().detach()) / BATCH
        assert float(method(batch, 3, objective).loss.detach()) == pytest.approx(total, rel=1e-10), name
        assert hidden or name == "stem"


def trained(configs: list[Config]) -> list[dict[str, Any]]:
    """Losses, and networks after each of six steps, two for each of three layers."""
    found = []
    for config in configs:
        torch.manual_seed(0)
        engine = build_engine(build_method(config, Length(6, 2, 40)), config, torch.device("cpu"))
        losses, states, told = [], [], []
        for step in range(6):
            batch = views_of_step(config, step)
            [objective] = engine.method.objectives_of(step)
            output = engine.forward_backward(batch, step, objective)
            check = engine.check(batch, output.loss)
            engine.update(check, step=step, lr=0.01, clip=0)
            losses.append(check.loss)
            told.append(engine.method.measures(check.loss, output.signs, 16))
            states.append({name: whole(value) for name, value in engine.state().items()})
        found.append({"losses": losses, "states": states, "rows": told})
    return found


@pytest.mark.distributed
def test_layers_learn_one_by_one_the_same_under_every_strategy():
    """What is done is the same to the bit from then on, and what is not begun has not moved."""
    exact = ["ddp", "fsdp", "fairscale"]
    ways = [(name, "fp64") for name in exact] + [(name, "fp32") for name in ("ddp", "zero1", "zero2", "zero3")]
    configs = [
        mini("denoising", *STACKED, f"parallel.strategy={name}", f"train.precision={precision}", "optim.name=adamw")
        for name, precision in ways
    ]
    [[alone]] = run_ranks(trained, 1, configs[:1])
    found = run_ranks(trained, 2, configs, timeout_s=300)[0]
    for (name, precision), run in zip(ways, found, strict=True):
        assert run["losses"] == pytest.approx(alone["losses"], rel=1e-9 if precision == "fp64" else 1e-3), name
        parts = (("stem", ".stem."), ("stage1", ".stages.0."), ("stage2", ".stages.1."))
        for place, (layer, part) in enumerate(parts):
            moved = [
                not all(
                    torch.equal(after[key], before[key])
                    for key in after
                    if key.startswith("model.") and (part in key or f"decoders.{layer}." in key)
                )
                for before, after in pairwise(run["states"])
            ]
            assert moved == [step // 2 == place for step in range(1, 6)], (name, layer, moved)
    rows = found[0]["rows"]
    assert "unexplained" in rows[0] and "stage1_unexplained" in rows[2] and "stage2_unexplained" in rows[5]
    columns = {column for panel in Denoising.panels(configs[0]) for column in panel.columns.values()}
    assert columns <= {key for row in rows for key in row}
    assert Denoising.brief(rows[5]) == f" ({rows[5]['stage2_unexplained']:.1%} of the variance missing)"


def test_every_layer_learns_to_restore_its_input():
    """Of black and white images."""
    method = build(*STACKED, "method.noise=0", "train.precision=fp32").float()
    generator = torch.Generator().manual_seed(0)
    for objective in method.objectives:
        optimizer, missing = torch.optim.Adam(method.parameters(), lr=0.005), []
        for step in range(50):
            colours = torch.randn(16, 1, 1, 1, generator=generator).sign().expand(16, 3, SIDE, SIDE)
            output = method(Views([colours], torch.arange(16) + 16 * step), step, objective)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            missing.append(missing_in(method.measures(0.0, output.signs, 16)))
        assert missing[0] > 0.8 and sorted(missing[-15:])[7] < 0.5, objective


def test_a_run_whose_last_layers_would_not_learn_is_told():
    config = mini("denoising", *STACKED, "optim.final_lr=0")
    [line] = Denoising.complaints(config, Length(8, 1, 40))
    assert line.startswith("optim.final_lr=0: with method.layers=one_by_one the last layer learns at the end")
    [line] = Denoising.complaints(mini("denoising", *STACKED, "optim.final_lr=0.1"), Length(2, 1, 40))
    assert line.startswith("method.layers=one_by_one: 3 layers in 2 steps")
    assert Denoising.complaints(mini("denoising"), Length(2, 1, 40)) == []


def test_a_later_layer_that_never_learns_is_not_put_down_to_a_rate_that_is_too_high():
    rows: list[dict[str, Any]] = [{"unexplained": 0.3, "progress": 0.1 * number} for number in range(1, 4)]
    rows += [{"stage1_unexplained": 1.0, "progress": 0.1 * number} for number in range(4, 7)]
    words = str(judge(mini("denoising", *STACKED), rows))
    assert words.startswith("a layer does not restore its input: 100% of the variance")
    rows = [{"unexplained": 0.3 if number < 4 else 1.0, "progress": 0.1 * number} for number in range(1, 7)]
    assert str(judge(mini("denoising"), rows)).startswith("learning rate too high")


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([*STACKED, "method.mask=blocks"], "method.mask=blocks: expected `pixels`"),
        ([*STACKED, "method.masked=0"], "method.masked=0.0: expected above 0, since nothing else hides what maps show"),
        (["method.masked=0", "method.noise=0"], "method.masked=0.0: expected above 0, or method.noise above 0"),
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected one group of one view"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, words):
    with pytest.raises(InputError) as refusal:
        mini("denoising", *overrides)
    assert words in str(refusal.value)
