"""Tasks on tiles: what is cut, what does not fit, and that a planted shortcut is taken without its cure alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from largescale.config import Config, load_config
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods import METHODS, build_method
from largescale.methods.tile_task import TileTask
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.doctor import said_of
from tests.methods.harness import mini

TASKS = [name for name, method in METHODS.items() if issubclass(method, TileTask)]
SIDE, BATCH = 24, 32


def tiny(name: str, *overrides: str) -> Config:
    """Nine tiles of 6 px, without a gap, so that they move."""
    own = ["method.cells=3", "method.permutations=8"] if name == "jigsaw" else ["method.aberration=none"]
    shift = ["method.channel_shift=0", "method.tile=6", "method.gap=0", "method.embedding=16", "method.hidden=[32]"]
    crops = f"data.crops=[{{num: 1, size: {SIDE}}}]"
    return mini(name, "train.precision=fp32", crops, *own, *shift, *overrides)


def in_cells(values: Tensor) -> Tensor:
    """Images [B, 3, SIDE, SIDE] of which each cell is a value of [3, 3]."""
    return values.repeat_interleave(SIDE // 3, 0).repeat_interleave(SIDE // 3, 1).expand(BATCH, 3, -1, -1)


def brightness_in_cells(generator: torch.Generator) -> Tensor:
    """Noise, and a step of brightness from cell to cell that is the same in all images."""
    noise = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    return noise + in_cells(torch.linspace(-4, 4, 9).view(3, 3))


def lines_between_cells(generator: torch.Generator) -> Tensor:
    """Noise, and bright lines that run along the borders of cells, one pixel on each side."""
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    for border in (SIDE // 3, 2 * SIDE // 3):
        images[:, :, border - 1 : border + 1] += 4
        images[..., border - 1 : border + 1] += 4
    return images


def displaced_red(generator: torch.Generator) -> Tensor:
    """In each cell a white square anywhere, whose red stands a pixel farther from the middle of the image."""
    cell, outwards = SIDE // 3, torch.tensor([-1, 0, 1])
    down, right = torch.randint(cell, (2, BATCH, 3, 3, 1), generator=generator)

    def squares(*corner: Tensor) -> Tensor:
        rows, columns = ((torch.arange(cell) - place) % cell < 3 for place in corner)
        return (rows[..., :, None] & columns[..., None, :]).float().transpose(2, 3).reshape(BATCH, 1, SIDE, SIDE)

    white, red = squares(down, right), squares(down + outwards[:, None, None], right + outwards[:, None])
    return torch.cat([red, white, white], dim=1) + 0.05 * torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)


def tint_in_cells(generator: torch.Generator) -> Tensor:
    """Noise, and a tint between green and magenta that is the same in all images."""
    tints = torch.tensor([-1.0, 2.0, -1.0])[:, None, None] * in_cells(torch.linspace(-2, 2, 9).view(3, 3))
    return tints + torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)


def stripes_in_cells(generator: torch.Generator) -> Tensor:
    """Waves whose direction and length tell the cell, at any phase, with some noise."""
    place = torch.arange(SIDE, dtype=torch.float32)
    phases = 2 * math.pi * torch.rand(BATCH, 1, 1, 1, generator=generator)
    angles = in_cells(torch.arange(3.0).repeat(3, 1) * math.pi / 3)
    lengths = in_cells(torch.tensor([0.8, 1.6, 2.6]).repeat(3, 1).T)
    waves = torch.sin(lengths * (place[:, None] * angles.sin() + place * angles.cos()) + phases)
    return waves + 0.1 * torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)


def learn(config: Config, images: Callable[[torch.Generator], Tensor], steps: int) -> list[float]:
    """Shares told right, step by step."""
    torch.manual_seed(0)
    method = build_method(config)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    generator, found = torch.Generator().manual_seed(1), []
    for step in range(steps):
        views = Views([images(generator)], torch.arange(BATCH) + step * BATCH)
        output = method(views, step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        found.append(float(output.signs["task_accuracy"]))
    return found


WHOLE_CELLS, AS_IT_IS = "method.tile=8", "method.tile_normalisation=false"
SHORTCUTS = {
    "brightness, and normalised tiles": (brightness_in_cells, [AS_IT_IS], [], 40, 0.95),
    "edges that go on, and a gap": (lines_between_cells, [WHOLE_CELLS], ["method.gap=2"], 40, 0.95),
    "a tint, and the projection": (tint_in_cells, [AS_IT_IS], [AS_IT_IS, "method.aberration=projection"], 40, 0.95),
    "displaced red, and one channel": (
        displaced_red,
        [WHOLE_CELLS],
        [WHOLE_CELLS, "method.aberration=single_channel"],
        60,
        0.95,
    ),
    # Small tiles, that channels may be moved in their cells: what red tells of places is learnt slowly.
    "displaced red, and moved channels": (
        displaced_red,
        ["method.tile=4"],
        ["method.tile=4", "method.channel_shift=2"],
        100,
        0.35,
    ),
}
"""What is planted, settings without its cure and with it, steps, and the share told right without it, at the least."""


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("name", TASKS)
def test_a_planted_shortcut_is_taken_without_its_cure_alone(name, shortcut):
    images, without, cured, steps, least = SHORTCUTS[shortcut]
    chance = 1 / METHODS[name].num_classes(tiny(name))
    told = [learn(tiny(name, "data.std=[1, 1, 1]", *way), images, steps)[-10:] for way in (without, cured)]
    assert sum(told[0]) / 10 > least
    assert sum(told[1]) / 10 < chance + 0.1


@pytest.mark.parametrize("name", TASKS)
def test_the_projection_leaves_what_red_alone_tells_of_places(name):
    """Channels that are displaced are still added up: a double image, of which two thirds are red's. A known limit."""
    projected = tiny(name, WHOLE_CELLS, "method.aberration=projection", "data.std=[1, 1, 1]")
    assert sum(learn(projected, displaced_red, 60)[-10:]) / 10 > 0.9


@pytest.mark.parametrize("name", TASKS)
def test_it_starts_at_chance_and_learns_what_can_be_seen(name):
    found = learn(tiny(name), stripes_in_cells, 40)
    assert found[0] < 1 / METHODS[name].num_classes(tiny(name)) + 0.12
    assert sum(found[-10:]) / 10 > 0.97


@pytest.mark.parametrize("name", TASKS)
def test_tiles_are_what_the_settings_say(name):
    """Means of tiles, and what of the colours is left."""
    images = brightness_in_cells(torch.Generator().manual_seed(0))
    views = Views([images], torch.arange(BATCH))

    def tiles(*overrides: str) -> Tensor:
        [found] = build_method(tiny(name, *overrides)).task_views(views, 3).images
        assert found.shape == (BATCH * 9, 3, 6, 6) and found.is_contiguous(memory_format=torch.channels_last)
        return found

    assert tiles().mean((2, 3)).abs().max() < 1e-5
    raw = tiles("method.tile_normalisation=false")
    assert raw.mean((2, 3)).abs().max() > 3
    single = tiles("method.aberration=single_channel")
    assert torch.equal((single.std((2, 3)) > 0.5).sum(1), torch.ones(BATCH * 9, dtype=torch.int64))
    projected = tiles("method.aberration=projection", "method.tile_normalisation=false", "data.std=[0.2, 0.2, 0.2]")
    green_against_magenta = projected[:, 1] - (projected[:, 0] + projected[:, 2]) / 2
    assert green_against_magenta.abs().max() < 1e-4
    assert not torch.equal(tiles("method.channel_shift=1"), tiles())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.crops=[{num: 2, size: 24}]"], "data.crops=[2]: expected one group of one view, which tiles are cut"),
        (["data.crops=[{num: 1, size: 24}, {num: 1, size: 24}]"], "data.crops=[1, 1]: expected one group of one view"),
        (["method.tile=9"], "method.tile=9: expected at most 8: cells of data.crops.0 have 8 px"),
        (["method.tile=6", "method.gap=1", "method.channel_shift=1"], "method.tile=6: expected at most 5"),
        (["method.gap=8"], "method.gap=8: expected at most 7: cells of data.crops.0 have 8 px, and a tile and"),
        (["method.gap=5", "method.channel_shift=2"], "method.gap=5: expected at most 3"),
        (["method.channel_shift=4"], "method.channel_shift=4: expected at most 3: cells of data.crops.0 have 8 px"),
        (
            ["model.backbone=vgg16_bn", "model.stem=imagenet"],
            "method.tile=6: expected at least 32 with model.backbone=",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, overrides, words):
    with pytest.raises(InputError) as refusal:
        tiny(name, *overrides)
    assert words in str(refusal.value)


@pytest.mark.parametrize("name", TASKS)
def test_a_solved_task_without_a_cure_may_be_a_shortcut(name):
    solved = {"task_accuracy": 0.995, "loss_over_ln_k": 0.02}
    for override, remedy in (
        ("method.tile_normalisation=false", "method.tile_normalisation=true"),
        ("method.tile=8", "Lower method.tile"),
    ):
        words = said_of(tiny(name, override), solved)
        assert "told by traces that say nothing of images" in words and remedy in words


@pytest.mark.parametrize("name", TASKS)
def test_tiles_are_fitted_to_the_views_of_a_proposed_recipe(name):
    config = load_config(ROOT / f"configs/pretext/{name}.yaml", ["data.shards=none"])
    config.data.crops[0].size = 160
    suited = METHODS[name].suited(config, Length.nominal(config))
    expected = {"jigsaw": (39, 0, 1), "patches": (35, 12, 0)}[name]
    assert tuple(suited[key].value for key in ("tile", "gap", "channel_shift")) == expected
