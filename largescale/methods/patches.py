"""Patches of views in a random order, cut on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from largescale.data.device_random import uniform

_PURPOSE = 40
"""Keeps these numbers apart from others that are drawn for the same sample and step."""


def shuffled_patches(images: Tensor, ids: Tensor, *, cells: int, size: int, seed: int, step: int) -> Tensor:
    """One patch of each cell of a grid over each image, at a random place in its cell, the cells in a random order.

    Place and order are a function of (seed, step, sample id).

    Args:
        images: [B, C, S, S].
        ids: of the samples, int64 [B].
        cells: along a side of the grid; what `cells` does not divide is left over at the right and below.
        size: side of a patch, at most that of a cell.

    Returns:
        [B * cells^2, C, size, size], the patches of an image one after the other.
    """
    batch, count, side = len(images), cells * cells, images.shape[-1] // cells
    draws = uniform(seed, step, ids, _PURPOSE, num=3 * count, device=images.device).unflatten(1, (3, count))
    cell = draws[:, 0].argsort(dim=1)
    down, right = (draws[:, 1:] * (side - size + 1)).long().unbind(1)
    pixels = torch.arange(size, device=images.device)
    rows = (cell // cells * side + down)[..., None] + pixels
    columns = (cell % cells * side + right)[..., None] + pixels
    samples = torch.arange(batch, device=images.device)[:, None, None, None]
    cut = images.permute(0, 2, 3, 1)[samples, rows[..., :, None], columns[..., None, :]]
    return cut.flatten(0, 1).permute(0, 3, 1, 2)
