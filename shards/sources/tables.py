"""Lists of files as a source: CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO
from urllib.parse import unquote

import pyarrow
from pyarrow import parquet

from shards.format.json_text import json_text, plain
from shards.format.keys import FreshKeys
from shards.ground.errors import InputError
from shards.images.names import suffix_of, why_no_image
from shards.sources.found import Content, Found, first_folder, left_out
from shards.sources.isolated import rows_apart
from shards.stores.folders import Folder, StoreFolder, open_folder
from shards.stores.locate import process_context
from shards.stores.store import is_url

_WEB = ("http://", "https://")

_BYTES = "column `{}` holds bytes, which JSON cannot hold; leave it out of the list, or write it as text"


class _NoList(Exception):
    """A table whose columns are not those of a list."""


class ListSource:
    """Files that a list names: CSV with a header, JSON lines, or Parquet, with a column `path` (relative ones are below
    the list's folder; URLs may lead to any store). Other columns become the sample's json; one may be the label.

    A place is a row.
    """

    kind = "list"

    def __init__(self, folder: Folder, name: str, label_column: str) -> None:
        self.location, self._name, self._label_column = f"{folder.location}/{name}", name, label_column
        self._folder = folder
        self._stores: dict[str, Folder] = {}

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        number = -1
        for number, row in enumerate(self._rows()):
            try:
                found = self._checked(number, row)
            except RecursionError as error:
                raise InputError(
                    f"{self.location}: row {number + 1} is nested too deeply; leave that column out of the list"
                ) from error
            yield found
        if number < 0:
            raise InputError(f"{self.location}: lists no files; expected a row for each, with a column `path`")

    def read(self, place: str) -> Content:
        """See `Source`."""
        columns = self.columns(place)
        extra = {"json": json_text(columns).encode()} if columns else {}
        path = json.loads(place)["path"]
        folder, name = self._find(path)
        try:
            return Content(folder.read(name), suffix_of(without_query(path)), extra)
        except InputError:
            raise
        except ValueError as error:  # of a name that no file can have
            raise OSError(0, "not a possible path") from error

    def columns(self, place: str) -> dict[str, Any]:
        """What a row says besides the path."""
        return {name: value for name, value in json.loads(place).items() if name != "path"}

    def name(self, place: str) -> str:
        """See `Source`."""
        path = json.loads(place)["path"]
        try:
            os.fsencode(path)
        except UnicodeEncodeError:  # half of a character, which JSON can spell and no text may hold
            return path.encode("utf-8", "replace").decode()
        return path

    def identity(self, place: str) -> str:
        """See `Source`: rows that only say other things of a file are still its rows."""
        return self.name(place)

    def reads(self, place: str) -> int:
        """See `Source`."""
        return self._find(json.loads(place)["path"])[0].reads

    def compare_with(self, places: Sequence[str]) -> None:
        """See `Source`: each store is compared with itself."""
        found = [self._find(json.loads(place)["path"]) for place in places]
        for folder in {id(folder): folder for folder, _ in found}.values():
            folder.compare_with([name for other, name in found if other is folder])

    def _checked(self, number: int, row: Any) -> Found:
        if not isinstance(row, dict) or not isinstance(row.get("path"), str):
            raise InputError(f"{self.location}: row {number + 1} has no `path`; expected a column of that name")
        if column := next((name for name, value in row.items() if _holds_bytes(value)), ""):
            raise InputError(f"{self.location}: {_BYTES.format(column)}")
        if self._label_column and plain(row.get(self._label_column)) in (None, ""):
            text = f"{self.location}: row {number + 1} has no `{self._label_column}`, which --labels asks for"
            raise InputError(text)
        return self._found(number, row)

    def _found(self, number: int, row: dict[str, Any]) -> Found:
        place, path = json_text(row), row["path"]
        if reason := self._why_left_out(row):
            return left_out(place, reason)
        folder, name = self._find(path)
        try:
            size = folder.size(name)
        except (OSError, ValueError):  # reported when it is read
            size = -1
        label = str(row[self._label_column]) if self._label_column else ""
        key = f"{number:010d}_{FreshKeys().of_file(without_query(path).rpartition('/')[2])}"
        return Found(place, key, size, label, "" if folder is not self._folder else first_folder(path))

    def _why_left_out(self, row: dict[str, Any]) -> str:
        return why_no_image(without_query(row["path"]))

    def _find(self, path: str) -> tuple[Folder, str]:
        """The folder that a path is read from, and its name there."""
        if path.startswith("file:///"):
            return self._local, unquote(path.removeprefix("file://"))
        if not is_url(path):
            return self._folder, path
        scheme, _, rest = path.partition("://")
        host, _, name = rest.partition("/")
        return self._store(f"{scheme}://{host}"), name.partition("#")[0] if path.startswith(_WEB) else name

    def _store(self, root: str) -> Folder:
        if root not in self._stores:
            is_web = root.startswith(_WEB)
            self._stores[root] = StoreFolder(root, spelled=True) if is_web else open_folder(root)
        return self._stores[root]

    @property
    def _local(self) -> Folder:
        return self._store("/")

    def _rows(self) -> Iterator[dict[str, Any]]:
        in_memory = self.location.startswith("memory:")  # of this process alone
        if suffix_of(self._name) in _APART and not in_memory:
            yield from rows_apart(self._read_rows, self.location, process_context(self.location))
        else:
            yield from self._read_rows()

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        try:
            with self._folder.open(self._name) as file:
                yield from READERS[suffix_of(self._name)](file)
        except InputError:  # the store that the list is in
            raise
        except _NoList as error:
            raise InputError(f"{self.location}: {error}") from error
        except Exception as error:  # what a library makes of damage: numbers too long, dates after the year 9999
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{self.location}: cannot be read ({why})") from error


def without_query(path: str) -> str:
    """The part of a path, or of a URL, that names a file: `https://host/a.jpg` of `https://host/a.jpg?v=2`."""
    return re.split("[?#]", path, maxsplit=1)[0] if path.startswith(_WEB) else path


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_holds_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes | bytearray | memoryview)


def _read_csv(file: BinaryIO) -> Iterator[dict[str, Any]]:
    # utf-8-sig: spreadsheets begin their files with a mark. strict: else an open quote swallows the rows that follow.
    rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    try:
        for row in rows:
            if None in row:
                raise csv.Error("more columns than the header has; put quotes around texts with commas")
            yield row
    except csv.Error as error:
        hint = "; is there an unclosed quote?" if "unexpected end" in str(error) else ""
        raise csv.Error(f"line {rows.reader.line_num}: {error}{hint}") from error


def _read_json_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in io.TextIOWrapper(file, encoding="utf-8-sig") if line.strip())


def _read_parquet(file: BinaryIO) -> Iterator[dict[str, Any]]:
    with parquet.ParquetFile(file) as table:
        _check_columns(table.schema_arrow)  # before any row: images themselves may be gigabytes of them
        # Without threads: libarrow's do not survive the fork that starts worker processes.
        for batch in table.iter_batches(_BATCH, use_threads=False):
            yield from batch.to_pylist()


def _check_columns(columns: pyarrow.Schema) -> None:
    """Check that a table is a list of paths. _NoList: it is not."""
    of_bytes = next((column.name for column in columns if _has_bytes(column.type)), "")
    if "path" in columns.names:
        if of_bytes:
            raise _NoList(_BYTES.format(of_bytes))
        return
    if of_bytes:
        raise _NoList(
            f"has no column `path`, and column `{of_bytes}` holds bytes; if they are images, write them to files "
            f"or tars first, and convert those"
        )
    raise _NoList("has no column `path`; expected a row for each image, with its path or URL")


def _has_bytes(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    if pyarrow.types.is_nested(kind):
        return any(_has_bytes(kind.field(number).type) for number in range(kind.num_fields))
    tests = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    return any(getattr(pyarrow.types, test)(kind) for test in tests if hasattr(pyarrow.types, test))


_BATCH = 4096
"""Rows that are Python's objects at a time: each may hold a long text."""

_APART = ("parquet",)
"""Lists that are read by libraries in C++, which damage may crash."""

READERS: dict[str, Callable[[BinaryIO], Iterator[dict[str, Any]]]] = {
    "csv": _read_csv,
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
}
