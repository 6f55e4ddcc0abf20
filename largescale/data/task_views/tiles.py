"""Tiles of views: one of each cell of a grid, at a random place in it, cut on the device.

Everything drawn is a function of (seed, step, sample id) and of what it is for. The tiles of an image stand one after
the other, so that their order does not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from largescale.data.device_random import uniform

_SHUFFLED, _PLACES, _SHIFTS, _OVERLAPPING = 40, 50, 51, 57
"""Keep these numbers apart from others that are drawn for the same sample and step."""


@dataclass(frozen=True)
class Grid:
    """Cells over a view, and what of each is taken. What they do not divide is left over at the right and below.

    Attributes:
        cells: along a side.
        tile: side of a tile in pixels.
        gap: least distance in pixels between tiles of neighbouring cells, and of their channels.
        channel_shift: pixels that each channel of a tile may be moved by at most, along both sides.
    """

    cells: int
    tile: int
    gap: int = 0
    channel_shift: int = 0

    @property
    def num_tiles(self) -> int:
        """Tiles of a view."""
        return self.cells * self.cells

    def least_cell(self) -> int:
        """Side of the smallest cell that a tile fits into, with the gap and shifted channels."""
        return self.tile + self.gap + 2 * self.channel_shift


def jittered_tiles(images: Tensor, ids: Tensor, order: Tensor, grid: Grid, *, seed: int, step: int) -> Tensor:
    """A tile of each cell, at a random place in it, its channels shifted against each other.

    Args:
        images: [B, C, S, S], whose cells have a side of at least `grid.least_cell()`.
        ids: of the samples, int64 [B].
        order: which cell stands at which place of the result, numbered in reading order, int64 [B, T].
        grid: of T cells.
        seed: of the run.
        step: of the run.

    Returns:
        [B * T, C, tile, tile].
    """
    batch, channels = images.shape[:2]
    side, device = images.shape[-1] // grid.cells, images.device
    draws = uniform(seed, step, ids, _PLACES, num=2 * grid.num_tiles, device=device).unflatten(1, (2, -1))
    room = side - grid.least_cell() + 1
    places = (draws * room).long() + grid.gap // 2 + grid.channel_shift
    if grid.channel_shift == 0:
        return _cut(images, order, places, cells=grid.cells, side=side, tile=grid.tile)
    draws = uniform(seed, step, ids, _SHIFTS, num=2 * grid.num_tiles * channels, device=device)
    shifts = (draws * (2 * grid.channel_shift + 1)).long() - grid.channel_shift
    shifts = shifts.view(batch, channels, 2, grid.num_tiles)
    each = [
        _cut(one, order, places + shifts[:, channel], cells=grid.cells, side=side, tile=grid.tile)
        for channel, one in enumerate(images.split(1, dim=1))
    ]
    return torch.cat(each, dim=1)


def shuffled_tiles(images: Tensor, ids: Tensor, grid: Grid, *, seed: int, step: int) -> Tensor:
    """A tile of each cell, at a random place in it, the cells in any order: [B * T, C, tile, tile] of [B, C, S, S]."""
    draws = uniform(seed, step, ids, _SHUFFLED, num=3 * grid.num_tiles, device=images.device).unflatten(1, (3, -1))
    side = images.shape[-1] // grid.cells
    places = (draws[:, 1:] * (side - grid.tile + 1)).long()
    return _cut(images, draws[:, 0].argsort(dim=1), places, cells=grid.cells, side=side, tile=grid.tile)


@dataclass(frozen=True)
class Windows:
    """Windows over a view that may overlap, and what of each is taken.

    Attributes:
        window: side in pixels.
        stride: pixels from one to the next.
        tile: side of what is taken, at a random place in its window.
    """

    window: int
    stride: int
    tile: int

    def along(self, side: int) -> int:
        """Windows along a side of so many pixels."""
        return (side - self.window) // self.stride + 1


def overlapping_tiles(images: Tensor, ids: Tensor, windows: Windows, *, seed: int, step: int) -> Tensor:
    """A tile of each of g x g windows in reading order: [B * g * g, C, tile, tile] of [B, C, S, S]."""
    along = windows.along(images.shape[-1])
    draws = uniform(seed, step, ids, _OVERLAPPING, num=2 * along * along, device=images.device)
    places = (draws.unflatten(1, (2, -1)) * (windows.window - windows.tile + 1)).long()
    order = torch.arange(along * along, device=images.device).expand(len(ids), -1)
    return _cut(images, order, places, cells=along, side=windows.stride, tile=windows.tile)


def _cut(images: Tensor, order: Tensor, places: Tensor, *, cells: int, side: int, tile: int) -> Tensor:
    """Tiles at places [B, 2, T] in the cells of an order [B, T], which begin `side` pixels after each other."""
    down, right = places.unbind(1)
    pixels = torch.arange(tile, device=images.device)
    rows = (order // cells * side + down)[..., None] + pixels
    columns = (order % cells * side + right)[..., None] + pixels
    samples = torch.arange(len(images), device=images.device)[:, None, None, None]
    cut = images.permute(0, 2, 3, 1)[samples, rows[..., :, None], columns[..., None, :]]
    return cut.flatten(0, 1).permute(0, 3, 1, 2)
