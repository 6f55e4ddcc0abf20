"""Frames of a clip in another order, and what keeps a network from telling their order by other things than motion.

Views of a sample are frames; those of a batch stand view after view. Everything drawn is a function of (seed, step,
sample id) and of what it is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from largescale.data.device_random import uniform
from largescale.data.views import Views

_ORDERS, _REVERSED, _SHIFTS, _CHANNELS = 60, 61, 62, 63
"""Keep these numbers apart from others that are drawn for the same sample and step."""


def reordered(views: Views, order: Tensor) -> Views:
    """Views whose place p shows what was at place order[:, p], with their facts.

    Args:
        views: of one group of F views.
        order: int64 [B, F].
    """
    [images] = views.images
    rows = order.T * len(order) + torch.arange(len(order), device=order.device)  # [F, B]
    facts = {name: values.flatten(0, 1)[rows] for name, values in views.facts.items()}
    return views._replace(images=[images[rows.flatten()]], facts=facts)


def drawn_reversals(ids: Tensor, count: int, *, seed: int, step: int) -> Tensor:
    """Orders int64 [B, count] of so many frames: as they are, or the last one first, each for half of the samples."""
    turned = uniform(seed, step, ids, _REVERSED, num=1, device=ids.device) < 0.5
    order = torch.arange(count, device=ids.device)
    return torch.where(turned, order.flip(0), order)


def drawn_numbers(ids: Tensor, count: int, *, seed: int, step: int) -> Tensor:
    """Numbers of orders below `count`, int64 [B]."""
    return (uniform(seed, step, ids, _ORDERS, num=1, device=ids.device)[:, 0] * count).long()


def shifted_crops(frames: Tensor, ids: Tensor, most: int, *, seed: int, step: int) -> Tensor:
    """What is left of frames without a margin, each displaced by up to `most` pixels both ways.

    Args:
        frames: [F * B, C, S, S].
        ids: of the samples, int64 [B].
        most: half of what a side loses, in pixels.
        seed: of the run.
        step: of the run.

    Returns:
        [F * B, C, S - 2 * most, S - 2 * most].
    """
    if most == 0:
        return frames
    num, side = len(frames) // len(ids), frames.shape[-1] - 2 * most
    draws = uniform(seed, step, ids, _SHIFTS, num=2 * num, device=ids.device).view(len(ids), num, 2)
    start = (draws * (2 * most + 1)).long().transpose(0, 1).flatten(0, 1)  # [F * B, 2]
    along = torch.arange(side, device=ids.device)
    rows, columns = ((start[:, axis, None] + along) for axis in (0, 1))
    number = torch.arange(len(frames), device=ids.device)[:, None, None]
    return frames.movedim(1, -1)[number, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def split_channels(frames: Tensor, ids: Tensor, *, seed: int, step: int) -> Tensor:
    """One channel of each frame at random, in the place of all (Lee et al., arXiv 1708.01246).

    Args:
        frames: [F * B, C, h, w].
        ids: of the samples, int64 [B].
        seed: of the run.
        step: of the run.
    """
    num, channels = len(frames) // len(ids), frames.shape[1]
    draws = uniform(seed, step, ids, _CHANNELS, num=num, device=ids.device)
    chosen = (draws * channels).long().T.flatten()
    return frames[torch.arange(len(frames), device=ids.device), chosen][:, None].expand_as(frames)
