"""Augmentation of a batch of views on the device, every random parameter of a sample from its own draws.

Order: flip, rotation, colour jitter (its parts in a random order for each sample), gamma, gain, grayscale, blur,
solarisation, noise, erasing, normalisation. Definitions of jitter, grayscale and blur are torchvision's and SwAV's
(arXiv 2006.09882, appendix A), that of solarisation is torchvision's. Nothing depends on the batch a sample is in, and
nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from largescale.config import AugmentConfig
from largescale.models.compile import allow_many_graphs

DRAWS = 32
"""Uniform numbers per view (a few are spare, so that a new transform does not move the others)."""

# Which draw decides what. Only append: if a number moved, all views would change, and no run could be resumed.
(
    _FLIP,
    _ANGLE,
    _JITTER,
    _BRIGHTNESS,
    _CONTRAST,
    _SATURATION,
    _HUE,
    _ORDER,
    _GAMMA,
    _GRAY,
    _BLUR,
    _SIGMA,
    _NOISE_STD,
    _NOISE_KEY,
    _ERASE,
    _ERASE_H,
    _ERASE_W,
    _ERASE_TOP,
    _ERASE_LEFT,
    _ERASE_GREY,
    _GAIN,
    _SOLARISE,
) = (0, 1, 2, 3, 4, 5, 6, slice(7, 11), 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24)

_LUMA = (0.299, 0.587, 0.114)


class Augment:
    """Turns uint8 views into normalised network input.

    On a GPU the whole chain is compiled into few passes over the memory; elsewhere each change touches only the views
    that it applies to.

    Args:
        config: probabilities and strengths.
        mean, std: normalisation, one number per channel, for values in [0, 1].
        dtype: of the computation.
        out_dtype: of the result, if another.
        compiled: compile also elsewhere.
    """

    def __init__(
        self,
        config: AugmentConfig,
        mean: list[float],
        std: list[float],
        dtype: torch.dtype,
        out_dtype: torch.dtype | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.config, self.mean, self.std = config, mean, std
        self.dtype, self.out_dtype = dtype, out_dtype or dtype
        self._everywhere = compiled
        self._compiled: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, views: Tensor, draws: Tensor) -> Tensor:
        """Augment.

        Args:
            views: uint8 [N, 3, S, S], in any memory layout.
            draws: uniform numbers in [0, 1), float64 [N, DRAWS], on the device of the views.

        Returns:
            [N, 3, S, S], channels last in memory.
        """
        counters = noise_counters(views.shape[-2:], views.device) if self.config.noise > 0 else None
        if views.device.type == "cpu" and not self._everywhere:
            return self._change_all(views, draws.to(torch.float64), counters)
        if self._compiled is None:
            allow_many_graphs()
            self._compiled = torch.compile(self._change_all, dynamic=False, fullgraph=True)
        return self._compiled(views, draws.to(torch.float64), counters)

    def flips(self, draws: Tensor) -> Tensor:
        """Which views are mirrored by such draws [..., DRAWS]: bool [...]."""
        return draws[..., _FLIP] < self.config.flip

    def _change_all(self, views: Tensor, draws: Tensor, counters: Tensor | None) -> Tensor:
        config, uniforms = self.config, draws.to(self.dtype)
        x = views.to(self.dtype, memory_format=torch.contiguous_format).div(255)
        if config.flip > 0:
            x = _where(self.flips(draws), x, lambda x: x.flip(-1))
        if config.rotate_degrees > 0:
            x = rotate(x, (2 * uniforms[:, _ANGLE] - 1) * math.radians(config.rotate_degrees))
        if config.jitter > 0:
            x = self._jitter(x, draws, uniforms)
        if config.gamma > 0:
            x = x.clamp_min(0) ** _per_sample(torch.exp((2 * uniforms[:, _GAMMA] - 1) * config.gamma))
        if config.gain > 0:
            x = x * _per_sample(1 + (2 * uniforms[:, _GAIN] - 1) * config.gain)
        if config.grayscale > 0:
            x = _where(draws[:, _GRAY] < config.grayscale, x, lambda x: luma(x).expand_as(x))
        if config.blur > 0:
            low, high = config.blur_sigma
            sigma = low + uniforms[:, _SIGMA] * (high - low)
            x = _where(draws[:, _BLUR] < config.blur, x, lambda x, sigma: gaussian_blur(x, sigma, high), sigma)
        if config.solarise > 0:
            x = _where(draws[:, _SOLARISE] < config.solarise, x, lambda x: solarise(x, config.solarise_threshold))
        if counters is not None:
            noise = gaussian_noise(draws[:, _NOISE_KEY], counters, x.shape[-2:], self.dtype)
            x = x + noise * _per_sample(uniforms[:, _NOISE_STD] * config.noise)
        if config.erase > 0:
            x = self._erase(x, draws, uniforms)
        mean = torch.tensor(self.mean, dtype=self.dtype, device=x.device)[:, None, None]
        std = torch.tensor(self.std, dtype=self.dtype, device=x.device)[:, None, None]
        return ((x - mean) / std).to(self.out_dtype, memory_format=torch.channels_last)

    def _jitter(self, x: Tensor, draws: Tensor, uniforms: Tensor) -> Tensor:
        """Brightness, contrast, saturation and hue, in each sample's own order."""
        config = self.config
        parts: list[tuple[Callable[[Tensor, Tensor], Tensor], float, float, int]] = [
            (brightness, config.brightness, 1.0, _BRIGHTNESS),
            (contrast, config.contrast, 1.0, _CONTRAST),
            (saturation, config.saturation, 1.0, _SATURATION),
            (hue, config.hue, 0.0, _HUE),
        ]
        active = [part for part in parts if part[1] > 0]
        if not active:
            return x
        applies = draws[:, _JITTER] < config.jitter
        order = draws[:, _ORDER][:, : len(active)].argsort(dim=1)
        for slot in range(len(active)):
            for number, (change, strength, neutral, draw) in enumerate(active):
                amount = neutral + (2 * uniforms[:, draw] - 1) * strength
                amount = amount.clamp_min(0) if neutral else amount
                x = _where(applies & (order[:, slot] == number), x, change, _per_sample(amount))
        return x

    def _erase(self, x: Tensor, draws: Tensor, uniforms: Tensor) -> Tensor:
        """One rectangle of uniform grey."""
        side, (low, high) = x.shape[-1], self.config.erase_side
        sides = [(low + draws[:, draw] * (high - low)) * side for draw in (_ERASE_H, _ERASE_W)]
        starts = [
            draws[:, draw] * (side - length) for draw, length in zip((_ERASE_TOP, _ERASE_LEFT), sides, strict=True)
        ]
        place = torch.arange(side, device=x.device) + 0.5
        rows, columns = (
            (place >= start[:, None]) & (place < (start + length)[:, None])
            for start, length in zip(starts, sides, strict=True)
        )
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        erased = inside & _per_sample(draws[:, _ERASE] < self.config.erase)
        return torch.where(erased, _per_sample(uniforms[:, _ERASE_GREY]), x)


def _where(mask: Tensor, x: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Change the samples of a mask [N]; `parameters` have one row per sample.

    On the CPU only these are computed, in place; elsewhere picking them would have to wait for the device.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(_per_sample(mask), change(x, *parameters), x)
    rows = mask.nonzero()[:, 0]
    if len(rows) > 0:
        x[rows] = change(x[rows], *(values[rows] for values in parameters))
    return x


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def luma(x: Tensor) -> Tensor:
    """Grey value of RGB images: [N, 3, H, W] to [N, 1, H, W]."""
    red, green, blue = x.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


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
    radius = max(1, min(math.ceil(3 * largest_sigma), x.shape[-1] - 1))
    place = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (place / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    height, width = x.shape[-2:]
    padded = pad(x, (radius, radius, 0, 0), mode="reflect")
    x = _weighted_sum([padded[..., i : i + width] for i in range(2 * radius + 1)], kernel)
    padded = pad(x, (0, 0, radius, radius), mode="reflect")
    return _weighted_sum([padded[..., i : i + height, :] for i in range(2 * radius + 1)], kernel)


def _weighted_sum(parts: list[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of images [N, C, H, W], with weights per sample [N, parts]."""
    total = parts[0] * _per_sample(weights[:, 0])
    for place, part in enumerate(parts[1:], 1):
        total = torch.addcmul(total, part, _per_sample(weights[:, place]))
    return total


def solarise(x: Tensor, threshold: float) -> Tensor:
    """Invert the intensities from a threshold up, as film does where it is overexposed."""
    return torch.where(x >= threshold, 1 - x, x)


def noise_counters(shape: torch.Size, device: torch.device) -> Tensor:
    """What `gaussian_noise` hashes for each pixel, twice: int64 [2 * H * W]. Made outside of what is compiled, where
    the product would be taken for an index and must not overflow.
    """
    return torch.arange(2 * shape[0] * shape[1], device=device, dtype=torch.int64) * -4658895280553007687


def gaussian_noise(key: Tensor, counters: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Standard normal noise [N, 1, H, W], one value for all channels, hashed from a uniform key [N] and the pixel.

    Box-Muller on two SplitMix64-style hashes; counter-based, so it does not depend on the batch.
    """
    num_pixels = shape[0] * shape[1]
    bits = (key * 2.0**53).to(torch.int64)[:, None] * -7046029254386353131 + counters
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        bits = (bits ^ _shift_right(bits, shift)) * factor
    bits = bits ^ _shift_right(bits, 31)
    uniforms = (_shift_right(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    first, second = uniforms[:, :num_pixels].to(dtype), uniforms[:, num_pixels:].to(dtype)
    tiny = torch.finfo(dtype).tiny
    normal = torch.sqrt(-2 * torch.log(first.clamp_min(tiny))) * torch.cos(2 * math.pi * second)
    return normal.view(-1, 1, *shape)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of int64: torch's own keeps the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
