"""Rows that another process reads: all of them, in order, and whatever becomes of that process is a line."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from shards.ground.errors import InputError
from shards.sources.isolated import rows_apart

FORK = multiprocessing.get_context("fork")


def rows(count: int, end: int | str = 0) -> Iterator[dict[str, int]]:
    """So many rows, then an error or a signal."""
    yield from ({"number": number} for number in range(count))
    if isinstance(end, str):
        raise InputError(end)
    if end:
        faulthandler.disable()  # pytest's, which would tell of it at length
        os.kill(os.getpid(), end)


@pytest.mark.parametrize("count", [0, 1, 4096, 9000])
def test_all_rows_come_in_order(count):
    assert list(rows_apart(partial(rows, count), "a.parquet", FORK)) == list(rows(count))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "end, says",
    [
        ("a.parquet: cannot be read (no reason)", r"^a\.parquet: cannot be read \(no reason\)$"),
        (signal.SIGSEGV, r"^a\.parquet: cannot be read \(it crashes the library .*SIGSEGV\); it is damaged: write"),
        (signal.SIGKILL, r"^a\.parquet: the process that read it was killed, .*memory ran out; .* as \.csv or \.jsonl"),
    ],
)
def test_what_ends_the_process_is_a_line(end, says):
    found = rows_apart(partial(rows, 5000, end), "a.parquet", FORK)
    assert [next(found)["number"] for _ in range(4096)] == list(range(4096))
    with pytest.raises(InputError, match=says):
        list(found)
    assert not multiprocessing.active_children()


def test_the_process_ends_with_who_reads():
    found = rows_apart(partial(rows, 10**9), "a.parquet", FORK)
    assert next(found) == {"number": 0}
    found.close()
    assert not multiprocessing.active_children()
