"""Square views turned by quarters, exactly: by flips and transposes, which resample nothing (RotNet, arXiv 1803.07728,
section 2.2).

Turn the square view, not the photograph it is cut from: else its shape or a border would give the turn away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from largescale.data.device_random import uniform

NUM_TURNS = 4
"""By 0, 90, 180 and 270 degrees."""
_PURPOSE = 46
"""Keeps these numbers apart from others that are drawn for the same sample and step."""


class Turned(NamedTuple):
    """Views and what was done to them.

    Attributes:
        images: [V * B, C, S, S], view after view.
        turns: quarters counter-clockwise, int64 [V, B].
    """

    images: Tensor
    turns: Tensor


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Images [N, C, S, S] turned counter-clockwise by 0 to 3 quarters, int64 [N]; in the same memory format.

    Raises:
        ValueError: images are not square.
    """
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images of {images.shape[2]}x{images.shape[3]} px: only square ones can be turned")
    by = turns[:, None, None, None]
    lying = torch.where(by % 2 == 1, images.transpose(2, 3), images)
    upside_down = torch.where((by == 1) | (by == 2), lying.flip(2), lying)
    found = torch.where(by >= 2, upside_down.flip(3), upside_down)
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return found.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def all_turns(images: Tensor, batch: int) -> Turned:
    """Each view in all four turns: four times as many views, a turn of all of them after the other.

    Args:
        images: [V * B, C, S, S], view after view.
        batch: B.
    """
    views = len(images) // batch
    turns = torch.arange(NUM_TURNS, device=images.device).repeat_interleave(views)[:, None].expand(-1, batch)
    return Turned(turned(images.repeat(NUM_TURNS, 1, 1, 1), turns.flatten()), turns)


def random_turns(images: Tensor, ids: Tensor, *, seed: int, step: int, group: int = 0) -> Turned:
    """Each view in one turn, drawn from (seed, step, sample id, group) and its place among the group's views.

    Args:
        images: [V * B, C, S, S], view after view.
        ids: of the samples, int64 [B].
        seed: of the run.
        step: of the run.
        group: number of the crop group that the views are of.
    """
    draws = uniform(seed, step, ids, group, _PURPOSE, num=len(images) // len(ids), device=images.device)
    turns = (draws.T * NUM_TURNS).long()
    return Turned(turned(images, turns.flatten()), turns)
