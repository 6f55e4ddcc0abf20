"""The list of what was left out, in Parquet: `source`, `reason` and, for a duplicate, what it `repeats`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow
from pyarrow import parquet

from shards.ground.errors import InputError
from shards.ground.files import atomic_write

SKIPPED_NAME = "skipped.parquet"

_SCHEMA = pyarrow.schema([("source", pyarrow.string()), ("reason", pyarrow.string()), ("repeats", pyarrow.string())])
_ROWS_AT_ONCE = 65536


def write_ledger(path: Path, rows: Iterable[dict[str, str]]) -> Counter[str]:
    """Write the list; returns how many rows each reason has."""
    counts: Counter[str] = Counter()
    left = iter(rows)
    with atomic_write(path) as file, parquet.ParquetWriter(file, _SCHEMA) as writer:
        while block := list(islice(left, _ROWS_AT_ONCE)):
            counts.update(row["reason"] for row in block)
            writer.write_table(pyarrow.Table.from_pylist(block, _SCHEMA))
    return counts


def read_ledger(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a list.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(_ROWS_AT_ONCE, use_threads=False):  # threads do not survive a fork
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from error
