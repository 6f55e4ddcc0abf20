from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import one_hot

from largescale.data.task_views.lab import lab_of, srgb_of
from largescale.data.task_views.rotation import random_turns
from largescale.data.views import Views
from largescale.methods import METHODS, build_method
from largescale.methods.pictures import in_range, laid_out
from tests.methods.harness import mini

DRAWING = [name for name, method in METHODS.items() if method.pictures is not None]


def test_intensities_come_back_and_are_cut():
    config = mini("denoising", "data.mean=[0.1, 0.2, 0.3]", "data.std=[0.5, 0.25, 0.1]")
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = (torch.tensor(one, dtype=torch.float64)[:, None, None] for one in (config.data.mean, config.data.std))
    torch.testing.assert_close(in_range((images - mean) / std, config), images)
    torch.testing.assert_close(in_range((3 * images - 1 - mean) / std, config), (3 * images - 1).clamp(0, 1))


def test_tiles_lie_in_reading_order_with_white_between():
    tiles = torch.rand(2, 9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = laid_out(tiles, gap=2)
    assert found.shape == (2, 3, 16, 16)
    for place in range(9):
        top, left = 6 * (place // 3), 6 * (place % 3)
        assert torch.equal(found[:, :, top : top + 4, left : left + 4], tiles[:, place])
    assert bool((found[:, :, 4:6] == 1).all()) and bool((found[..., 10:12] == 1).all())
    assert torch.equal(laid_out(tiles, gap=0)[:, :, 4:8, 8:12], tiles[:, 5])


@pytest.mark.parametrize("name", DRAWING)
def test_pictures_are_as_many_as_columns_in_range_and_end_with_the_image(name):
    config = mini(name)
    method, side = build_method(config).double().eval(), config.data.crops[0].size
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views = Views([images], torch.tensor([5, 900, 3, 17]))
    if (sound := config.method.sounds()) is not None:
        generator = torch.Generator().manual_seed(1)
        heard = torch.randint(-9000, 9000, (4, sound.num_samples), dtype=torch.int16, generator=generator)
        views = views._replace(sounds=heard)
    with torch.no_grad():
        columns, again = method.draw(views), method.draw(views)
    assert method.pictures is not None and len(columns) == len(method.pictures.columns)
    for column, same in zip(columns, again, strict=True):
        assert column.shape[:2] == (4, 3) and column.min() >= 0 and column.max() <= 1
        assert torch.equal(column, same)
    torch.testing.assert_close(columns[-1], in_range(images, config))


def test_tiles_that_are_told_right_are_put_back_in_order():
    """Of images whose cells differ in brightness."""
    method = build_method(mini("jigsaw", "method.channel_shift=0"))
    right = functools.partial(one_hot, num_classes=len(method.orders))
    method.embed = lambda views: {"logits": right(views.facts["permutation"])[None]}
    cells = (torch.arange(4.0).view(2, 2) / 8).repeat_interleave(12, 0).repeat_interleave(12, 1)
    images = cells.expand(20, 3, -1, -1)
    shuffled, put_back, whole = method.draw(Views([images], torch.arange(20)))
    corners = [column[:, 0][:, [1, 1, -2, -2], [1, -2, 1, -2]] for column in (shuffled, put_back, whole)]
    assert torch.equal(corners[1], corners[2])
    assert torch.equal(corners[0].sort(1).values, corners[2]) and not torch.equal(corners[0], corners[2])


def test_colours_that_are_told_right_are_those_of_the_image():
    """Of images of few colours, which are bins."""
    method = build_method(mini("colorization", "method.temperature=0.01", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"))
    bins = method.bins[method.bins.norm(dim=1) < 30]
    lab = torch.cat([torch.full((len(bins), 1), 60.0), bins], dim=1)
    images = srgb_of(lab[..., None, None].expand(-1, -1, 24, 24).clone())
    method.embed = lambda views: {"logits": -100 * torch.cdist(bins, method.bins)[None, :, None, None]}
    grey, predicted, whole = method.draw(Views([images], torch.arange(len(bins))))
    torch.testing.assert_close(predicted, whole, rtol=0, atol=1e-3)
    torch.testing.assert_close(lab_of(grey)[:, 0], torch.full((len(bins), 24, 24), 60.0), rtol=0, atol=1e-2)
    assert float(lab_of(grey)[:, 1:].abs().max()) < 1e-2


def test_turns_that_are_told_right_are_turned_back():
    method = build_method(mini("rotation"))
    images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    turns = random_turns(images, torch.arange(20), seed=0, step=0).turns[0]
    method.backbone, method.head.forward = torch.nn.Identity(), lambda shown: one_hot(turns, 4)
    turned, back, whole = method.draw(Views([images], torch.arange(20)))
    assert torch.equal(back, whole)
    assert [torch.equal(a, b) for a, b in zip(turned, whole, strict=True)] == (turns == 0).tolist()


def test_tiles_lie_where_they_are_told_to_be():
    """Of images whose cells differ in brightness: all right; and all told to be the one in the last place."""
    method = build_method(mini("patches", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"))
    cells = (torch.arange(9.0).view(3, 3) / 9).repeat_interleave(8, 0).repeat_interleave(8, 1)
    images = torch.nn.functional.pad(cells, (0, 2, 0, 2)).expand(4, 3, 26, 26)
    last = torch.zeros(8, 8)
    last[:, 7] = torch.arange(1.0, 9)
    for logits, expected in (
        (10 * torch.eye(8), torch.arange(9.0) / 9),
        (last, torch.tensor([*[9] * 4, 4, *[9] * 3, 8]) / 9),
    ):
        method.embed = lambda views, logits=logits: {"logits": logits.expand(1, 4, 8, 8)}
        tiles, told, _ = method.draw(Views([images], torch.arange(4)))
        step = tiles.shape[-1] // 3 + 1
        torch.testing.assert_close(tiles[0, 0, ::step, ::step].flatten(), torch.arange(9.0) / 9)
        torch.testing.assert_close(told[0, 0, ::step, ::step].flatten(), expected)


def test_patches_that_are_guessed_are_those_of_the_best_score():
    """Each patch's embedding says which it is, and guesses say the one that comes first among all."""
    method = build_method(mini("cpc"))
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    count = 2 * 4 * 4
    eye = torch.eye(count).view(2, 4, 4, count)
    right = torch.zeros(2, 2, 4, 4, count)
    right[0, :, :-2] = eye[:, 2:]
    method.embed = lambda views: {"patches": eye[None], "guesses": right}
    patches, guessed, _ = method.draw(Views([images], torch.arange(2)))
    assert torch.equal(patches, guessed)
    right[0] = eye[0, 0, 0]
    _, guessed, _ = method.draw(Views([images], torch.arange(2)))
    tile = method.config.tile
    assert torch.equal(guessed[1, :, -tile:, -tile:], patches[0, :, :tile, :tile])
    assert torch.equal(guessed[:, :, :tile], patches[:, :, :tile]), "rows at the top are as they are"
