"""Changes of images [N, 3, H, W] with intensities in [0, 1], each by parameters of its own.

Definitions of jitter, grayscale and blur are torchvision's and SwAV's (arXiv 2006.09882, appendix A), that of
solarisation is torchvision's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from largescale.data.augment_draws import ERASE_H, ERASE_LEFT, ERASE_TOP, ERASE_W
from largescale.data.device_random import GOLDEN, MIX_1, mix, shifted

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a grey value."""


def per_sample(values: Tensor) -> Tensor:
    """Values [N] to [N, 1, 1, 1]."""
    return values[:, None, None, None]


def luma(x: Tensor) -> Tensor:
    """Grey value of RGB images: [N, 3, H, W] to [N, 1, H, W]."""
    red, green, blue = x.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a factor [N, 1, 1, 1]; 1 changes nothing."""
    return (x * factor).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with each image's mean grey value; 1 changes nothing."""
    mean = luma(x).mean(dim=(1, 2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image; 1 changes nothing."""
    grey = luma(x)
    return (grey + (x - grey) * factor).clamp(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by a share of the colour circle [N, 1, 1, 1]; 0 changes nothing."""
    red, green, blue = x.unbind(1)
    value, smallest = x.amax(1), x.amin(1)
    chroma = value - smallest
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    angle = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    angle = angle / 6 + shift[:, 0]
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device)[:, None, None]
    k = (offsets + 6 * angle[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate about the centre by angles [N] in radians, bilinear, black outside."""
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = affine_grid(matrix, list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def gaussian_blur(x: Tensor, sigma: Tensor, largest_sigma: float) -> Tensor:
    """Blur each image with its own standard deviation [N] in pixels, reflecting at the border.

    A sum of shifted images rather than a grouped convolution: elementwise work gives a sample the same bits in any
    batch.
    """
    height, width = x.shape[-2:]
    kernel = blur_kernel(sigma, largest_sigma, width)
    radius = kernel.shape[1] // 2
    padded = pad(x, (radius, radius, 0, 0), mode="reflect")
    x = _weighted_sum([padded[..., i : i + width] for i in range(2 * radius + 1)], kernel)
    padded = pad(x, (0, 0, radius, radius), mode="reflect")
    return _weighted_sum([padded[..., i : i + height, :] for i in range(2 * radius + 1)], kernel)


def blur_kernel(sigma: Tensor, largest_sigma: float, side: int) -> Tensor:
    """Weights of `gaussian_blur` for standard deviations [N], of one width for all images: [N, 2 * radius + 1]."""
    radius = max(1, min(math.ceil(3 * largest_sigma), side - 1))
    place = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-0.5 * (place / sigma[:, None]) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def _weighted_sum(parts: list[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of images [N, C, H, W], with weights per sample [N, parts]."""
    total = parts[0] * per_sample(weights[:, 0])
    for place, part in enumerate(parts[1:], 1):
        total = torch.addcmul(total, part, per_sample(weights[:, place]))
    return total


def solarise(x: Tensor, threshold: float) -> Tensor:
    """Invert the intensities from a threshold up, as film does where it is overexposed."""
    return torch.where(x >= threshold, 1 - x, x)


def erase(x: Tensor, applies: Tensor, draws: Tensor, sides: tuple[float, float], grey: Tensor) -> Tensor:
    """One rectangle of uniform grey [N] in the images of a mask [N]; its sides are between two shares of an image's, by
    draws [N, DRAWS].
    """
    side, (low, high) = x.shape[-1], sides
    lengths = [(low + draws[:, draw] * (high - low)) * side for draw in (ERASE_H, ERASE_W)]
    starts = [draws[:, draw] * (side - length) for draw, length in zip((ERASE_TOP, ERASE_LEFT), lengths, strict=True)]
    place = torch.arange(side, device=x.device) + 0.5
    rows, columns = (
        (place >= start[:, None]) & (place < (start + length)[:, None])
        for start, length in zip(starts, lengths, strict=True)
    )
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return torch.where(inside & per_sample(applies), per_sample(grey), x)


def noise_counters(shape: torch.Size, device: torch.device) -> Tensor:
    """What `gaussian_noise` hashes for each pixel, twice: int64 [2 * H * W]. Made outside of what is compiled, where
    the product would be taken for an index and must not overflow.
    """
    return torch.arange(2 * shape[0] * shape[1], device=device, dtype=torch.int64) * MIX_1


def gaussian_noise(key: Tensor, counters: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Standard normal noise [N, 1, H, W], one value for all channels, hashed from a uniform key [N] and the pixel.

    Box-Muller on two SplitMix64-style hashes; counter-based, so it does not depend on the batch.
    """
    num_pixels = shape[0] * shape[1]
    bits = mix((key * 2.0**53).to(torch.int64)[:, None] * GOLDEN + counters)
    uniforms = (shifted(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    first, second = uniforms[:, :num_pixels].to(dtype), uniforms[:, num_pixels:].to(dtype)
    tiny = torch.finfo(dtype).tiny
    normal = torch.sqrt(-2 * torch.log(first.clamp_min(tiny))) * torch.cos(2 * math.pi * second)
    return normal.view(-1, 1, *shape)
