"""Shared by methods that make images: what of the variance of pixels is missing in what is made.

1 is no better than the mean colour everywhere. Moments are what steps report, since variances of micro-batches and
ranks do not add up to that of all.
"""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from largescale.methods.method import Row, Sign, Symptom

DAMAGE = MappingProxyType(dict.fromkeys(("noise", "erase"), "what is to be made is then damaged itself"))
"""`Method.spoilers` of such methods."""
_NOTHING = 0.98
_LEAST = 1e-12


def moments_of(name: str, channels: int = 3) -> dict[str, Sign]:
    """Signs `NAME_mean` and `NAME_square`: of each channel, the mean of what is to be made and of its square."""
    moment = Sign(shape=(channels,))
    return {f"{name}_mean": moment, f"{name}_square": moment}


def variance_of(name: str, signs: dict[str, Tensor]) -> float:
    """Of what is to be made, within its channels; by the signs of `moments_of`."""
    return max(float((signs[f"{name}_square"] - signs[f"{name}_mean"].square()).mean()), _LEAST)


def missing_in(row: Row) -> float | None:
    """The share that is missing, 1 for the mean; of layers that learn one after the other, the last that has learnt."""
    found = [value for key, value in row.items() if key.endswith("unexplained")]
    return found[-1] if found else None


def said_missing(row: Row) -> str:
    """What a console line adds."""
    missing = missing_in(row)
    return "" if missing is None else f" ({missing:.1%} of the variance missing)"


def nothing_made(title: str, *, of: str, where: str, maker: str, remedy: str, by_rate: bool = True) -> Symptom:
    """That what is made is no better than the mean colour everywhere.

    Args:
        title: of the symptom.
        of: whose variance.
        where: it is missing.
        maker: what gives the mean colour.
        remedy: what to try.
        by_rate: of the symptom.
    """
    return Symptom(
        title,
        sign=missing_in,
        sick=(_NOTHING, float("inf")),
        recovery="down",
        seen=lambda row: f"{missing_in(row):.0%} of the variance of {of} is missing in {where}",
        remedy=remedy,
        meaning=f"{maker} gives the mean colour everywhere",
        by_rate=by_rate,
    )
