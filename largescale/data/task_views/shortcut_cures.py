"""Changes of tiles that take away what tells where in an image they were, other than by what they show.

Neighbouring tiles share brightness and contrast. A lens bends green light differently from red and blue, so coloured
fringes grow with the distance from the centre. A single channel has none. Without the colour between green and magenta
they hardly show: displaced channels are still added up, which leaves a faint double image (Doersch et al., arXiv
1505.05192, section 3.1; Noroozi and Favaro, arXiv 1603.09246, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from largescale.data.changes import gaussian_noise, noise_counters
from largescale.data.device_random import uniform

_KEPT = 52
"""Keeps these numbers apart from others that are drawn for the same sample and step."""
_NOISE_OVER_STD = 0.01
_GREEN_MAGENTA = (-1.0, 2.0, -1.0)


def normalised(tiles: Tensor) -> Tensor:
    """Every channel of every tile [N, C, h, w] with mean 0 and standard deviation 1; 0 where it has a single value."""
    x = tiles.to(torch.promote_types(tiles.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    # The mean of equal values may be off by a rounding, which must not become a deviation of 1.
    flat = x.amax((2, 3), keepdim=True) == x.amin((2, 3), keepdim=True)
    return torch.where(flat, 0, (x - mean) / torch.where(flat, 1, var.sqrt())).to(tiles.dtype)


def single_channels(tiles: Tensor, ids: Tensor, *, seed: int, step: int) -> Tensor:
    """One channel of every tile at random; in the place of others noise of a hundredth of its standard deviation.

    Args:
        tiles: [B * T, C, h, w], those of a sample one after the other.
        ids: of the samples, int64 [B].
        seed: of the run.
        step: of the run.
    """
    count, channels = len(tiles) // len(ids), tiles.shape[1]
    draws = uniform(seed, step, ids, _KEPT, num=2 * count, device=tiles.device).view(-1, 2)
    kept = (draws[:, 0] * channels).long()[:, None] == torch.arange(channels, device=tiles.device)
    kept = kept[:, :, None, None]
    std = tiles.masked_fill(~kept, 0).sum(1).std((1, 2), correction=0)[:, None, None, None]
    size = tiles.shape[-2:]
    noise = gaussian_noise(draws[:, 1], noise_counters(size, tiles.device), size, tiles.dtype)
    return torch.where(kept, tiles, noise * (_NOISE_OVER_STD * std))


def without_green_magenta(images: Tensor, std: list[float]) -> Tensor:
    """Images without the colour that lenses displace: of every pixel, what is orthogonal to green against magenta.

    Args:
        images: [N, 3, H, W], normalised.
        std: what channels were divided by.
    """
    channels, length = images.unbind(1), sum(axis * axis for axis in _GREEN_MAGENTA)
    weights = [axis / length * deviation for axis, deviation in zip(_GREEN_MAGENTA, std, strict=True)]
    amount = sum((weight * channel for weight, channel in zip(weights, channels, strict=True)), channels[0] * 0)
    taken = zip(channels, _GREEN_MAGENTA, std, strict=True)
    return torch.stack([channel - axis / deviation * amount for channel, axis, deviation in taken], dim=1)
