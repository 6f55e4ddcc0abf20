"""Batches that threads read while the network works on the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

_THREADS = 8

How = TypeVar("How")
Item = TypeVar("Item")


def read_ahead(
    read: Callable[[int, How], Item], wanted: Iterable[tuple[np.ndarray, Sequence[How]]]
) -> Iterator[list[Item]]:
    """What `read(sample id, how)` gives of the samples of each batch.

    Args:
        read: called by several threads.
        wanted: sample ids of each batch, and how each of them is to be read.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        waiting = None
        for ids, hows in wanted:
            coming = [threads.submit(read, int(one), how) for one, how in zip(ids, hows, strict=True)]
            if waiting is not None:
                yield [one.result() for one in waiting]
            waiting = coming
        if waiting is not None:
            yield [one.result() for one in waiting]
