"""Counter-based random numbers: a pure function of (seed, epoch, sample, view, draw), with no state to carry.

A sample's views must not depend on which rank or worker makes them, so nothing here advances a generator:
each number is a hash of its coordinates. The hash is the finaliser of SplitMix64 (Steele et al., 2014,
"Fast splittable pseudorandom number generators"), chained over the coordinates.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ALL_BITS = 2**64 - 1


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection on uint64 whose output bits all depend on all input bits."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def hash_coordinates(*coordinates: int | np.ndarray) -> np.ndarray:
    """Hash integer coordinates (broadcast against each other) to uint64.

    Negative coordinates are taken modulo 2**64.
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), np.uint64)
        for coordinate in coordinates:
            value = np.asarray(coordinate).astype(np.int64).astype(np.uint64)
            state = mix(state + _GOLDEN + value * _MIX_2)
        return state


def uniform(*coordinates: int | np.ndarray, num: int) -> np.ndarray:
    """`num` uniform numbers in [0, 1) for each coordinate tuple: float64 of shape [..., num]."""
    bits = hash_coordinates(*[np.asarray(c)[..., None] for c in coordinates], np.arange(num))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_at(*coordinates: int, num: int) -> np.ndarray:
    """`uniform` of a single coordinate tuple, [num]: of few numbers Python is faster than arrays."""
    state = 0
    for coordinate in coordinates:
        state = _mixed(state, coordinate)
    return np.array([(_mixed(state, draw) >> 11) * 2.0**-53 for draw in range(num)])


def _mixed(state: int, coordinate: int) -> int:
    """A step of `hash_coordinates`."""
    value = (state + int(_GOLDEN) + int(coordinate) * int(_MIX_2)) & _ALL_BITS
    value = ((value ^ (value >> 30)) * int(_MIX_1)) & _ALL_BITS
    value = ((value ^ (value >> 27)) * int(_MIX_2)) & _ALL_BITS
    return value ^ (value >> 31)


def permute(positions: np.ndarray, size: int | np.ndarray, key: np.ndarray, rounds: int = 6) -> np.ndarray:
    """A keyed permutation of [0, size) evaluated at `positions`, without materialising it.

    A balanced Feistel network on the next even power of two, cycle-walked back into the range: memory O(1),
    so a window of any length can be shuffled by arithmetic.

    Args:
        positions: int64 [N], each in [0, size).
        size: int64, broadcast against positions.
        key: uint64, broadcast against positions; selects the permutation.
    """
    positions, size, key = np.broadcast_arrays(
        np.asarray(positions, np.int64), np.asarray(size, np.int64), np.asarray(key, np.uint64)
    )
    half = np.ceil(np.log2(np.maximum(size, 2)) / 2).astype(np.int64)
    result = positions.copy()
    walking = np.ones(positions.shape, bool)
    while walking.any():
        result[walking] = _feistel(result[walking], half[walking], key[walking], rounds)
        walking = result >= size
    return result


def _feistel(values: np.ndarray, half: np.ndarray, key: np.ndarray, rounds: int) -> np.ndarray:
    mask = (np.int64(1) << half) - 1
    left, right = values >> half, values & mask
    for number in range(rounds):
        scrambled = hash_coordinates(key.view(np.int64), right, number).view(np.int64) & mask
        left, right = right, left ^ scrambled
    return (left << half) | right
