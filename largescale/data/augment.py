"""Augmentation of a batch of views on the device, every random parameter of a sample from its own draws.

Order: flip, rotation, colour jitter (its parts in a random order for each sample), gamma, gain, grayscale, blur,
solarisation, noise, erasing, normalisation. `changes.py` defines them. Nothing depends on the batch a sample is in, and
nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from largescale.config import AugmentConfig
from largescale.data import augment_draws as draw
from largescale.data.augment_on_cpu import CpuChain
from largescale.data.changes import (
    brightness,
    contrast,
    erase,
    gaussian_blur,
    gaussian_noise,
    hue,
    luma,
    noise_counters,
    per_sample,
    rotate,
    saturation,
    solarise,
)
from largescale.data.jitter import orders, parts
from largescale.models.compile import allow_many_graphs

_JITTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
}


class Augment:
    """Turns uint8 views into normalised network input.

    On a GPU the whole chain is compiled into few passes over the memory; on a CPU each change touches only the views
    that it applies to, a few at a time, in the processor's cache.

    Args:
        config: probabilities and strengths.
        mean, std: normalisation, one number per channel, for values in [0, 1].
        dtype: of the computation.
        out_dtype: of the result, if another.
        compiled: compile also on a CPU.
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
        self._on_cpu = None if compiled else CpuChain(config, mean, std, dtype, self.out_dtype)
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
        if self._on_cpu and views.device.type == "cpu":
            return self._on_cpu(views, draws.to(torch.float64), counters)
        if self._compiled is None:
            allow_many_graphs()
            self._compiled = torch.compile(self.change_all, dynamic=False, fullgraph=True)
        return self._compiled(views, draws.to(torch.float64), counters)

    def flips(self, draws: Tensor) -> Tensor:
        """Which views are mirrored by such draws [..., DRAWS]: bool [...]."""
        return draws[..., draw.FLIP] < self.config.flip

    def change_all(self, views: Tensor, draws: Tensor, counters: Tensor | None) -> Tensor:
        """The chain that is compiled: every change of all views, of which those are kept that it applies to."""
        config, uniforms = self.config, draws.to(self.dtype)
        x = views.to(self.dtype, memory_format=torch.contiguous_format).div(255)
        if config.flip > 0:
            x = _where(self.flips(draws), x.flip(-1), x)
        if config.rotate_degrees > 0:
            x = rotate(x, (2 * uniforms[:, draw.ANGLE] - 1) * math.radians(config.rotate_degrees))
        if config.jitter > 0:
            x = self._jitter(x, draws, uniforms)
        if config.gamma > 0:
            x = x.clamp_min(0) ** per_sample(torch.exp((2 * uniforms[:, draw.GAMMA] - 1) * config.gamma))
        if config.gain > 0:
            x = x * per_sample(1 + (2 * uniforms[:, draw.GAIN] - 1) * config.gain)
        if config.grayscale > 0:
            x = _where(draws[:, draw.GRAY] < config.grayscale, luma(x).expand_as(x), x)
        if config.blur > 0:
            low, high = config.blur_sigma
            sigma = low + uniforms[:, draw.SIGMA] * (high - low)
            x = _where(draws[:, draw.BLUR] < config.blur, gaussian_blur(x, sigma, high), x)
        if config.solarise > 0:
            x = _where(draws[:, draw.SOLARISE] < config.solarise, solarise(x, config.solarise_threshold), x)
        if counters is not None:
            noise = gaussian_noise(draws[:, draw.NOISE_KEY], counters, x.shape[-2:], self.dtype)
            x = x + noise * per_sample(uniforms[:, draw.NOISE_STD] * config.noise)
        if config.erase > 0:
            low, high = config.erase_side
            x = erase(x, draws[:, draw.ERASE] < config.erase, draws, (low, high), uniforms[:, draw.ERASE_GREY])
        mean = torch.tensor(self.mean, dtype=self.dtype, device=x.device)[:, None, None]
        std = torch.tensor(self.std, dtype=self.dtype, device=x.device)[:, None, None]
        return ((x - mean) / std).to(self.out_dtype, memory_format=torch.channels_last)

    def _jitter(self, x: Tensor, draws: Tensor, uniforms: Tensor) -> Tensor:
        """Brightness, contrast, saturation and hue, in each sample's own order."""
        active = parts(self.config)
        applies, order = draws[:, draw.JITTER] < self.config.jitter, orders(draws, len(active))
        for slot in range(len(active)):
            for number, part in enumerate(active):
                changed = _JITTER[part.name](x, per_sample(part.amounts(uniforms)))
                x = _where(applies & (order[:, slot] == number), changed, x)
        return x


def _where(mask: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    """Changed images where a mask [N] says so. Picking them would have to wait for the device."""
    return torch.where(per_sample(mask), changed, x)
