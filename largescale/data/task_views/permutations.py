"""Sets of permutations that differ in many places, so that a few tiles tell one from the others.

Two permutations differ by their Hamming distance, the number of places at which they do. What counts is the least
distance in a set: the mean hardly differs from that of random ones, while published sets of the largest mean
(arXiv 1603.09246) hold pairs that differ in 2 or 3 of 9 places.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations

import numpy as np
from torch import Tensor

from largescale.data.device_random import uniform

_DRAWN = 53
"""Keeps these numbers apart from others that are drawn for the same sample and step."""
MOST_PLACES = 9
"""All permutations of as many are looked through: 362,880."""


@cache
def permutation_set(count: int, places: int) -> np.ndarray:
    """So many permutations of 0, 1, ... `places` - 1, the same ones in every run.

    Up to 72 of nine places are maps x -> a x + b of the field of nine elements: two of them agree in one place at most,
    so that they differ in 8, which more than nine permutations of nine places cannot exceed. Other sets are
    greedy: each permutation is the first of those farthest from all before it.

    Returns:
        int64 [count, places], not to be written to.

    Raises:
        ValueError: for more permutations than there are, or more places than can be looked through.
    """
    affine = places == MOST_PLACES and count <= places * (places - 1)
    found = _affine()[:count] if affine else _greedy(count, places)
    found.flags.writeable = False
    return found


def drawn_orders(ids: Tensor, orders: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """One of P permutations for each sample, a function of (seed, step, sample id).

    Args:
        ids: of the samples, int64 [B].
        orders: the permutations, int64 [P, places], on the same device.
        seed: of the run.
        step: of the run.

    Returns:
        Which one, int64 [B]; and the permutation, int64 [B, places].
    """
    number = (uniform(seed, step, ids, _DRAWN, num=1, device=ids.device)[:, 0] * len(orders)).long()
    return number, orders[number]


def _affine() -> np.ndarray:
    """Maps of the field of nine elements, int64 [72, 9]; the element u + v i, where i * i = -1, has the number 3 u + v.
    Nine with one factor after the other, so that the first ones differ in most places.
    """
    elements = [divmod(number, 3) for number in range(9)]

    def image(a: tuple[int, int], x: tuple[int, int], b: tuple[int, int]) -> int:
        real = a[0] * x[0] - a[1] * x[1] + b[0]
        imaginary = a[0] * x[1] + a[1] * x[0] + b[1]
        return real % 3 * 3 + imaginary % 3

    return np.array([[image(a, x, b) for x in elements] for a in elements[1:] for b in elements])


def _greedy(count: int, places: int) -> np.ndarray:
    if places > MOST_PLACES:
        raise ValueError(f"{places} places: expected at most {MOST_PLACES}")
    every = np.array(list(permutations(range(places))), dtype=np.uint8).T.copy()
    if count > every.shape[1]:
        raise ValueError(f"{count} permutations of {places} places: there are {every.shape[1]}")
    # [place][value]: which permutations have the value at the place; a distance is a sum of a few of these.
    has = [[(row == value).view(np.uint8) for value in range(places)] for row in every]
    nearest = np.full(every.shape[1], places, np.uint8)
    chosen = []
    for _ in range(count):
        chosen.append(every[:, nearest.argmax()])
        distance = np.full_like(nearest, places)
        for place, value in enumerate(chosen[-1]):
            distance -= has[place][value]
        np.minimum(nearest, distance, out=nearest)
    return np.stack(chosen).astype(np.int64)
