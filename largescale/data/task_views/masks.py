"""Which pixels of an image a task hides, bool [B, 1, S, S], and noise: functions of (seed, step, sample id)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from largescale.data.device_random import uniform

_PIXELS, _BLOCKS, _NOISE, _ENTRIES = 54, 55, 56, 59
"""Keep these numbers apart from others that are drawn for the same sample and step."""
_NUM_BLOCKS = 4


def pixels(ids: Tensor, share: float, side: int, *, seed: int, step: int) -> Tensor:
    """Every pixel by itself, with a probability."""
    draws = uniform(seed, step, ids, _PIXELS, num=side * side, device=ids.device)
    return (draws < share).view(len(ids), 1, side, side)


def entries(ids: Tensor, share: float, side: int, *, seed: int, step: int) -> Tensor:
    """The same of a map's places, drawn apart from pixels."""
    draws = uniform(seed, step, ids, _ENTRIES, num=side * side, device=ids.device)
    return (draws < share).view(len(ids), 1, side, side)


def blocks(ids: Tensor, share: float, side: int, *, seed: int, step: int) -> Tensor:
    """Four squares at random places that may overlap, of a share of the image in all if they do not (as the blocks of
    arXiv 1604.07379, section 3.3).
    """
    length = block_side(share, side)
    draws = uniform(seed, step, ids, _BLOCKS, num=2 * _NUM_BLOCKS, device=ids.device).view(len(ids), 2, _NUM_BLOCKS, 1)
    first = (draws * (side - length + 1)).long()
    place = torch.arange(side, device=ids.device)
    inside = (place >= first) & (place < first + length)
    return (inside[:, 0, :, :, None] & inside[:, 1, :, None, :]).any(1, keepdim=True)


def block_side(share: float, side: int) -> int:
    """Side of one of the squares."""
    return min(side, max(1, round(side * math.sqrt(share / _NUM_BLOCKS))))


def centre_side(share: float, side: int) -> int:
    """Side of the square in the middle."""
    return min(side, max(1, round(side * math.sqrt(share))))


def centre(ids: Tensor, share: float, side: int) -> Tensor:
    """A square of a share of the image in its middle (arXiv 1604.07379, section 3.3), the same for all."""
    length = centre_side(share, side)
    first, place = (side - length) // 2, torch.arange(side, device=ids.device)
    inside = (place >= first) & (place < first + length)
    return (inside[:, None] & inside).expand(len(ids), 1, -1, -1)


def shrunk(hidden: Tensor, rim: int) -> Tensor:
    """What is left of hidden pixels without those that are at most `rim` pixels from a visible one, along or across."""
    if rim == 0:
        return hidden
    reached = max_pool2d((~hidden).float(), (2 * rim + 1, 1), stride=1, padding=(rim, 0))
    return max_pool2d(reached, (1, 2 * rim + 1), stride=1, padding=(0, rim)) == 0


def noise(ids: Tensor, side: int, *, seed: int, step: int) -> Tensor:
    """Standard normal numbers, float64 [B, 3, S, S]."""
    draws = uniform(seed, step, ids, _NOISE, num=3 * side * side, device=ids.device)
    return torch.special.ndtri(draws.clamp_min(2.0**-54)).view(len(ids), 3, side, side)
