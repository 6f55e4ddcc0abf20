from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.conversion import outcome
from shards.format.ledger import write_ledger
from shards.format.manifest import Manifest
from shards.sources.found import BROKEN, LINK


def written(folder: Path, rows: list[dict[str, str]]) -> Manifest:
    counts = write_ledger(folder / "skipped.parquet", rows)
    return Manifest(folder, "pile", (), (), "pile", {}, dict(counts))


def skipped(reason: str, count: int) -> list[dict[str, str]]:
    return [{"source": f"{reason[0]}{number}", "reason": reason} for number in range(count)]


def test_the_first_few_of_a_costly_reason_are_named(tmp_path):
    manifest = written(tmp_path, [*skipped("duplicate", 9), *skipped(BROKEN, 53), *skipped(LINK, 2)])
    lines = sorted(outcome.costly_reasons(manifest, str(tmp_path)))
    first = ", ".join(f"{BROKEN[0]}{number}" for number in range(50))
    assert any(line.startswith(f"{tmp_path}: {BROKEN}: {first} and 3 more; ") for line in lines)
    assert any(line.startswith(f"{tmp_path}: {LINK}: {LINK[0]}0, {LINK[0]}1; ") for line in lines)
    assert len(lines) == 2


def test_a_long_list_of_what_was_left_out_is_not_held_in_memory(tmp_path, monkeypatch: pytest.MonkeyPatch):
    manifest = written(tmp_path, [*skipped("duplicate", 400), *skipped(BROKEN, 1)])
    read, most = outcome.read_ledger, 0

    class Row(dict):
        """A dict that can be referred to weakly."""

    def counted(path: Path) -> Iterator[dict[str, str]]:
        nonlocal most
        seen: list[weakref.ref[Row]] = []
        for plain in read(path):
            row = Row(plain)
            seen.append(weakref.ref(row))
            most = max(most, sum(one() is not None for one in seen))
            yield row

    monkeypatch.setattr(outcome, "read_ledger", counted)
    assert len(list(outcome.costly_reasons(manifest, str(tmp_path)))) == 1
    assert most <= 2
