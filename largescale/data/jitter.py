"""What colour jitter draws for each view: which parts, how much of each, in which order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from largescale.config import AugmentConfig
from largescale.data import augment_draws as draw


@dataclass(frozen=True)
class JitterPart:
    """One of the changes that colour jitter is made of.

    Attributes:
        name: of the setting with its strength.
        strength: largest distance of an amount from the one that changes nothing.
        neutral: the amount that changes nothing: 1 for a factor, which is never negative; 0 for a shift.
        place: which draw decides on the amount.
    """

    name: str
    strength: float
    neutral: float
    place: int

    def amounts(self, uniforms: Tensor) -> Tensor:
        """Of each view [N], from uniform numbers [N, DRAWS]."""
        amounts = self.neutral + (2 * uniforms[:, self.place] - 1) * self.strength
        return amounts.clamp_min(0) if self.neutral else amounts


def parts(config: AugmentConfig) -> list[JitterPart]:
    """Those that change anything."""
    every = [
        JitterPart("brightness", config.brightness, 1.0, draw.BRIGHTNESS),
        JitterPart("contrast", config.contrast, 1.0, draw.CONTRAST),
        JitterPart("saturation", config.saturation, 1.0, draw.SATURATION),
        JitterPart("hue", config.hue, 0.0, draw.HUE),
    ]
    return [part for part in every if part.strength > 0]


def orders(draws: Tensor, num_parts: int) -> Tensor:
    """In which order each view goes through so many parts: part numbers, int64 [N, num_parts]."""
    return draws[:, draw.ORDER][:, :num_parts].argsort(dim=1)
