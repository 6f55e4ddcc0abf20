"""CIE L*a*b* of sRGB images, white point D65: lightness L from 0 to 100, a from green to red, b from blue to yellow.

Definitions: sRGB is IEC 61966-2-1, L*a*b* is CIE 15:2004, section 8.2.1. White is what the three primaries add up to,
so that a and b of greys are 0 but for rounding. Products are added up one by one: autocast and TensorFloat would round
those of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_FROM_XYZ = (
    (3.2404542, -1.5371385, -0.4985314),
    (-0.9692660, 1.8760108, 0.0415560),
    (0.0556434, -0.2040259, 1.0572252),
)
WHITE = tuple(sum(row) for row in TO_XYZ)
DELTA = 6 / 29
"""Where the cube root goes over into a straight line."""


def lab_of(images: Tensor) -> Tensor:
    """L, a and b [..., 3, H, W] of sRGB images [..., 3, H, W] in [0, 1]."""
    linear = _linear(images).unbind(-3)
    x, y, z = (_root(_weighted(linear, row) / white) for row, white in zip(TO_XYZ, WHITE, strict=True))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def srgb_of(lab: Tensor) -> Tensor:
    """sRGB images [..., 3, H, W] of L, a and b; colours that sRGB lacks are cut to [0, 1]."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    xyz = [white * _cube(root) for white, root in zip(WHITE, (y + a / 500, y, y - b / 200), strict=True)]
    return _encoded(torch.stack([_weighted(xyz, row) for row in _FROM_XYZ], dim=-3).clamp(0, 1))


def grey_of(images: Tensor) -> Tensor:
    """Grey sRGB images [..., 1, H, W] of the same lightness as images [..., 3, H, W] in [0, 1]."""
    return _encoded(_weighted(_linear(images).unbind(-3), TO_XYZ[1]) / WHITE[1]).unsqueeze(-3)


def _weighted(parts: tuple[Tensor, ...] | list[Tensor], weights: tuple[float, ...]) -> Tensor:
    first, second, third = parts
    return weights[0] * first + weights[1] * second + weights[2] * third


def _linear(encoded: Tensor) -> Tensor:
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _encoded(linear: Tensor) -> Tensor:
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def _root(share: Tensor) -> Tensor:
    return torch.where(share > DELTA**3, share.clamp_min(DELTA**3) ** (1 / 3), share / (3 * DELTA**2) + 4 / 29)


def _cube(root: Tensor) -> Tensor:
    return torch.where(root > DELTA, root**3, 3 * DELTA**2 * (root - 4 / 29))
