from __future__ import annotations

import pytest
import torch
from torch import Tensor

from largescale.data.device_random import uniform
from largescale.data.task_views.tiles import Grid, Windows, jittered_tiles, overlapping_tiles, shuffled_tiles

CELLS, SIZE, SIDE = 3, 5, 25
"""Cells of 8 pixels; one pixel is left over."""


def coordinates(batch: int, side: int = SIDE, channels: int = 2) -> Tensor:
    """Images whose pixels say where they are, [B, C, S, S]."""
    return torch.arange(side * side).view(1, 1, side, side).expand(batch, channels, side, side)


def cut(ids: list[int], *, seed: int = 0, step: int = 0) -> Tensor:
    """Shuffled tiles [B, 9, SIZE, SIZE] of images whose pixels say where they are."""
    found = shuffled_tiles(coordinates(len(ids)), torch.tensor(ids), Grid(CELLS, SIZE), seed=seed, step=step)
    assert torch.equal(found[:, 0], found[:, 1])
    return found[:, 0].unflatten(0, (len(ids), -1))


def jittered(ids: list[int], grid: Grid, side: int, *, order: Tensor | None = None, step: int = 0) -> Tensor:
    """Jittered tiles [B, T, C, tile, tile] of such images with three channels, in reading order."""
    order = torch.arange(grid.num_tiles).expand(len(ids), -1) if order is None else order
    images = coordinates(len(ids), side, 3)
    found = jittered_tiles(images, torch.tensor(ids), order, grid, seed=0, step=step)
    return found.unflatten(0, (len(ids), -1))


def test_each_cell_gives_a_whole_tile_at_a_random_place_in_a_random_order():
    tiles = cut(list(range(200)))
    corner = tiles[:, :, 0, 0]
    steps = torch.arange(SIZE)[:, None] * SIDE + torch.arange(SIZE)
    assert torch.equal(tiles, corner[..., None, None] + steps)
    down, right = corner // SIDE, corner % SIDE
    cells = down // 8 * CELLS + right // 8
    assert torch.equal(cells.sort(dim=1).values, torch.arange(9).expand(200, 9))
    for place in (down % 8, right % 8):
        assert place.unique().tolist() == [0, 1, 2, 3]  # and none that would reach over the cell's edge
    assert len(cells.unique(dim=0)) > 190
    assert (cells == cells[0]).float().mean(0).max() < 0.25  # no place of the order is fixed


def test_they_are_a_function_of_seed_step_and_sample_alone():
    together, alone = cut([4, 7, 4]), cut([7])
    assert torch.equal(together[0], together[2]) and torch.equal(together[1], alone[0])
    assert not torch.equal(cut([7], step=1), alone) and not torch.equal(cut([7], seed=1), alone)


def test_shuffled_tiles_are_those_of_a_loop():
    """With these numbers, so that a run that goes on sees what it would have seen."""
    images, ids = torch.randn(4, 3, SIDE, SIDE), torch.tensor([3, 9, 2, 9])
    found = shuffled_tiles(images, ids, Grid(CELLS, SIZE), seed=5, step=7).unflatten(0, (4, 9))
    draws = uniform(5, 7, ids, 40, num=27, device=torch.device("cpu")).view(4, 3, 9)
    for image, tiles, own in zip(images, found, draws, strict=True):
        for place, cell in enumerate(sorted(range(9), key=own[0].tolist().__getitem__)):
            top = cell // 3 * 8 + int(own[1, place] * 4)
            left = cell % 3 * 8 + int(own[2, place] * 4)
            assert torch.equal(tiles[place], image[:, top : top + SIZE, left : left + SIZE])


@pytest.mark.parametrize("grid", [Grid(3, 5), Grid(3, 5, gap=3), Grid(3, 4, gap=2, channel_shift=1), Grid(2, 9, gap=1)])
def test_jittered_tiles_use_all_places_and_keep_their_gap(grid):
    side = 8 * grid.cells if grid.cells == 3 else 13 * grid.cells
    cell, last = side // grid.cells, grid.tile - 1
    tiles = jittered(list(range(400)), grid, side).unflatten(1, (grid.cells, grid.cells))
    steps = torch.arange(grid.tile)[:, None] * side + torch.arange(grid.tile)
    assert torch.equal(tiles, tiles[..., :1, :1] + steps), "a tile is a piece of the image"
    top, left = tiles[..., 0, 0] // side, tiles[..., 0, 0] % side  # [B, row, column, channel]
    for row in range(grid.cells - 1):
        below, above = top[:, row + 1], top[:, row] + last
        assert (below.amin(2) - above.amax(2) - 1).min() == grid.gap
        right, left_of_it = left[:, :, row + 1], left[:, :, row] + last
        assert (right.amin(2) - left_of_it.amax(2) - 1).min() == grid.gap
    places = (top - torch.arange(grid.cells)[:, None, None] * cell).flatten().unique()
    assert places.tolist() == list(range(grid.gap // 2, cell - grid.tile - grid.gap + grid.gap // 2 + 1))
    apart = (top - top[..., :1]).abs().max()
    assert apart == 2 * grid.channel_shift, "channels move against each other, as far as they may"


def test_an_order_says_which_cell_stands_where():
    grid = Grid(3, 8)  # without room to move
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(n)) for n in range(5)])
    tiles = jittered([0, 1, 2, 3, 4], grid, 24, order=order)
    corner = tiles[:, :, 0, 0, 0]
    assert torch.equal(corner // 24 // 8 * 3 + corner % 24 // 8, order)
    upright = tiles[torch.arange(5)[:, None], order.argsort(1)]
    assert torch.equal(upright, jittered([0, 1, 2, 3, 4], grid, 24)), "the inverse order puts them back"


@pytest.mark.parametrize("shift", [0, 2])
def test_jittered_tiles_are_a_function_of_seed_step_and_sample_alone(shift):
    grid = Grid(3, 4, gap=1, channel_shift=shift)
    together, alone = jittered([4, 7, 4], grid, 36), jittered([7], grid, 36)
    assert torch.equal(together[0], together[2]) and torch.equal(together[1], alone[0])
    assert not torch.equal(jittered([7], grid, 36, step=1), alone)


@pytest.mark.parametrize("side, along", [(256, 7), (255, 6), (300, 8)])
def test_windows_along_a_side(side, along):
    assert Windows(64, 32, 60).along(side) == along


def test_overlapping_tiles_lie_anywhere_in_their_windows():
    windows, side = Windows(8, 5, 6), 24
    images = coordinates(200, side, 1)
    found = overlapping_tiles(images, torch.arange(200), windows, seed=0, step=0).view(200, 4, 4, 6, 6)
    corner = found[..., 0, 0]
    assert torch.equal(found, corner[..., None, None] + torch.arange(6)[:, None] * side + torch.arange(6))
    starts = torch.arange(4) * 5
    for place in (corner // side - starts[:, None], corner % side - starts):
        assert place.unique().tolist() == [0, 1, 2]
    alone = overlapping_tiles(images[:1], torch.tensor([7]), windows, seed=0, step=0)
    assert torch.equal(alone.view(4, 4, 6, 6), found[7])
    assert not torch.equal(overlapping_tiles(images[:1], torch.tensor([7]), windows, seed=0, step=1), alone)
