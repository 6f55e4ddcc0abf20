"""A random order of more numbers than one wants in memory.

Source: C. R. Rao (1961) and M. Sandelius (1962): numbers that are thrown into buckets by chance and then permuted in
each of them are permuted as a whole, every order equally likely.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

BUCKET = 2**18
"""Numbers that are permuted in memory at a time."""


def append_shuffled(numbers: Path, out: BinaryIO, seed: int | list[int], work: Path) -> None:
    """Append the numbers of a file to another, in a random order that depends on the seed and their count alone.

    Args:
        numbers: uint64 each.
        out: where to.
        seed: of the order.
        work: folder for the buckets; it is removed.
    """
    chance = np.random.default_rng(seed)
    num_buckets = -(-numbers.stat().st_size // (8 * BUCKET))
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        for block in _blocks(numbers):
            bucket = chance.integers(num_buckets, size=len(block)) if num_buckets > 1 else np.zeros(len(block), int)
            for number in range(num_buckets):
                with (work / str(number)).open("ab") as file:
                    block[bucket == number].tofile(file)
        for number in range(num_buckets):
            inside = np.fromfile(work / str(number), np.uint64)
            inside[chance.permutation(len(inside))].tofile(out)
    finally:
        shutil.rmtree(work)


def append(numbers: Path, out: BinaryIO) -> None:
    """Append the numbers of a file to another, in their order."""
    for block in _blocks(numbers):
        block.tofile(out)


def _blocks(numbers: Path) -> Iterator[np.ndarray]:
    for start in range(0, numbers.stat().st_size, 8 * BUCKET):
        yield np.fromfile(numbers, np.uint64, BUCKET, offset=start)
