"""Colours as classes: the ab plane of `lab.py` in bins, as arXiv 1603.08511, sections 2.1 to 2.3, and its table of 313.

Bins are points of a square grid, those from which the convex hull of all sRGB colours is less than a step of the grid
away in a and in b; in other words, the corners of the grid's squares that the hull enters. With steps of 10 these are
the 313 bins of the published code, which does not say how they were found; a test holds rows of its table. The squares
about colours themselves would be 261.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from largescale.data.task_views.lab import DELTA, TO_XYZ, WHITE

_DIRECTIONS = 3600
_REACH = 200
"""No sRGB colour has an a or b of so much."""
COLOURLESS = 5.0
"""The published limit: images whose a and b are nowhere farther from 0 show no colours."""


@cache
def gamut(step: int) -> np.ndarray:
    """Bins as a and b, in order: whole numbers in float64 [Q, 2], not to be written to.

    Args:
        step: of the grid.
    """
    angles = np.arange(_DIRECTIONS) * (2 * math.pi / _DIRECTIONS)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    # A convex hull is known by how far it reaches in each direction; its corners are on edges of the cube of colours.
    farthest = (_edges() @ directions).max(0)
    along = range(-(_REACH // step) * step, _REACH + 1, step)
    grid = np.array([(a, b) for a in along for b in along], dtype=float)
    nearest = grid @ directions - step * np.abs(directions).sum(0)
    found = grid[(nearest < farthest).all(1)]
    found.flags.writeable = False
    return found


def _edges() -> np.ndarray:
    """a and b of the sRGB colours of 8 bits whose channels are none or all, but for one: [12 * 256, 2]. In NumPy, since
    networks are also built where tensors hold nothing.
    """
    colours = [
        np.insert(np.full((256, 2), ends), free, np.arange(256) / 255, axis=1)
        for free in range(3)
        for ends in product((0.0, 1.0), repeat=2)
    ]
    encoded = np.concatenate(colours)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    shares = linear @ np.array(TO_XYZ).T / np.array(WHITE)
    x, y, z = np.where(shares > DELTA**3, np.cbrt(shares), shares / (3 * DELTA**2) + 4 / 29).T
    return np.stack([500 * (x - y), 200 * (y - z)], axis=1)


def distances(colours: Tensor, bins: Tensor) -> Tensor:
    """Of colours [..., 2] from bins [Q, 2]: [..., Q], by differences, since products would be rounded too much."""
    flat = torch.cdist(colours.reshape(-1, 2), bins, compute_mode="donot_use_mm_for_euclid_dist")
    return flat.unflatten(0, colours.shape[:-1])


def soft_bins(colours: Tensor, bins: Tensor, neighbours: int, sigma: float) -> tuple[Tensor, Tensor]:
    """The nearest bins of colours, and Gaussian shares of them that add up to 1 (section 2.1).

    Args:
        colours: a and b, [..., 2].
        bins: [Q, 2].
        neighbours: N.
        sigma: standard deviation of the Gaussian.

    Returns:
        Bins int64 [..., N], the nearest first, and shares [..., N].
    """
    found = distances(colours, bins).topk(neighbours, largest=False)
    return found.indices, (-found.values.square() / (2 * sigma**2)).softmax(-1)


def counts_of(colours: Tensor, bins: Tensor) -> Tensor:
    """How many of the colours [B, ..., 2] of each image are nearest to each bin [Q, 2]: [B, Q], in float32."""
    nearest = distances(colours, bins).argmin(-1).flatten(1)
    batch, count = len(nearest), len(bins)
    places = nearest + count * torch.arange(batch, device=nearest.device)[:, None]
    ones = torch.ones(places.numel(), device=nearest.device)
    return ones.new_zeros(batch * count).index_add_(0, places.flatten(), ones).view(batch, count)


def rebalancing(shares: Tensor, bins: Tensor, sigma: float, uniform: float) -> Tensor:
    """Weights of colours by their bin such that rare ones count more: [Q], 1 on average over colours (section 2.2,
    where the average is over the smoothed shares: another scale of the loss).

    Args:
        shares: of the bins among all colours, [Q].
        bins: [Q, 2].
        sigma: standard deviation of the Gaussian that smooths shares first; a uniform distribution stays uniform.
        uniform: share, above 0, of a uniform distribution that is mixed in; 1 makes all weights 1.
    """
    smooth = (-distances(bins, bins).square() / (2 * sigma**2)).softmax(-1) @ shares
    weights = 1 / ((1 - uniform) * smooth / smooth.sum() + uniform / len(bins))
    return weights / (shares * weights).sum()


def annealed_mean(logits: Tensor, bins: Tensor, temperature: float) -> Tensor:
    """One colour [..., 2] for predictions [..., Q]: their mean after they are sharpened, between the most likely bin
    (temperature 0) and the plain mean (1) (section 2.3).
    """
    return (logits / temperature).softmax(-1) @ bins


def coloured(colours: Tensor) -> Tensor:
    """Which images show colours: bool [B], of a and b [B, ..., 2]."""
    return (colours.abs() > COLOURLESS).flatten(1).any(1)
