"""`largescale.data.random.uniform` on the device of its coordinates: the same numbers, without a transfer."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def uniform(*coordinates: int | Tensor, num: int, device: torch.device) -> Tensor:
    """`num` uniform numbers in [0, 1) per tuple of integer coordinates, which are broadcast against each other.

    Returns:
        float64 [..., num].
    """
    bits = torch.zeros(1, dtype=torch.int64, device=device)
    for coordinate in coordinates:
        if isinstance(coordinate, int):
            bits = mix(bits + _signed((GOLDEN + coordinate * MIX_2) % (1 << 64)))
        else:
            bits = mix(bits + GOLDEN + coordinate[..., None] * MIX_2)
    bits = mix(bits + GOLDEN + torch.arange(num, device=device) * MIX_2)
    return shifted(bits, 11).double() * 2.0**-53


def mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser on two's complement: int64 products and sums wrap around as uint64 ones do."""
    values = (values ^ shifted(values, 30)) * MIX_1
    values = (values ^ shifted(values, 27)) * MIX_2
    return values ^ shifted(values, 31)


def shifted(values: Tensor, places: int) -> Tensor:
    """To the right, filled with zeros."""
    return (values >> places) & ((1 << (64 - places)) - 1)
