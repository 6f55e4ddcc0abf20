"""Where images come from: a folder, a zip archive, tars, a list of paths, on a disk or in a store. Each lists its files
in a fixed order and reads any of them by what it listed.

Names inside archives are only ever keys: nothing is extracted, and a member of an archive never becomes a path.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote

import pyarrow
from pyarrow import parquet

from shards.errors import InputError
from shards.folders import Folder, open_folder
from shards.keys import Keys
from shards.manifest import IMAGE_SUFFIXES
from shards.stores import is_url
from shards.tar import TarSample, walk


@dataclass(frozen=True)
class Found:
    """A file.

    Attributes:
        place: what `read` needs to find it.
        key: of its sample; empty for what is no image.
        size: in bytes, -1 where it is not known.
        label: its class, where the source names one.
    """

    place: str
    key: str
    size: int
    label: str = ""


@dataclass(frozen=True)
class Content:
    """The bytes of an image, its suffix, and other members of its sample (json, txt ...) by suffix."""

    payload: bytes
    suffix: str
    others: dict[str, bytes] = field(default_factory=dict)


class Source(Protocol):
    """What can be converted.

    Attributes:
        location: path or URL.
    """

    location: str

    def list(self) -> Iterator[Found]:
        """All files, in an order that is always the same. InputError: the source cannot be listed."""
        ...

    def read(self, place: str) -> Content:
        """One file. OSError: it cannot be read."""
        ...

    def name(self, place: str) -> str:
        """For people."""
        ...

    def reads(self, place: str) -> int:
        """How many files are best read at a time, where this one is."""
        ...


def open_source(location: str | Path, *, label_column: str = "") -> Source:
    """The source at a path or URL, by what is there: a folder of tars alone counts as tars.

    Raises:
        InputError: nothing is there, or nothing that can be converted.
    """
    location = str(location)
    suffix = _suffix(location)
    if is_url(location) or os.path.isfile(location):
        parent, name = os.path.split(location.rstrip("/"))
        folder = open_folder(parent)
        if suffix == "zip":
            return ZipSource(folder, name)
        if suffix in _READERS:
            return ListSource(folder, name, label_column)
        if suffix == "tar":
            return TarSource(f"{folder.location}/{name}", folder, [name])
    if not is_url(location) and not os.path.isdir(location):
        raise InputError(f"{location}: no such folder; pass a folder of images or of tars, a .zip, or a list "
                         f"({', '.join(f'.{name}' for name in _READERS)})")
    folder = open_folder(location)
    entries = folder.entries()
    tars = [entry.name for entry in entries if entry.is_file and _suffix(entry.name) == "tar"]
    if tars and not any(entry.is_folder or _is_image(entry.name) for entry in entries):
        return TarSource(folder.location, folder, tars)
    return FolderSource(folder)


class FolderSource:
    """Files below a folder, depth first, each folder's in the order of their names; memory of one branch of folders.

    A place is a path below it.
    """

    def __init__(self, folder: Folder) -> None:
        self.location, self._folder = folder.location, folder

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        yield from self._walk("", "")

    def read(self, place: str) -> Content:
        """See `Source`."""
        return Content(self._folder.read(place), _suffix(place))

    def name(self, place: str) -> str:
        """See `Source`."""
        return place

    def reads(self, place: str) -> int:
        """See `Source`."""
        return self._folder.reads

    def _walk(self, folder: str, key_folder: str) -> Iterator[Found]:
        files, folders = Keys(), Keys()
        for entry in self._folder.entries(folder):
            if entry.is_folder:
                yield from self._walk(f"{folder}{entry.name}/", f"{key_folder}{folders.of_folder(entry.name)}/")
                continue
            key = key_folder + files.of_file(entry.name) if entry.is_file and _is_image(entry.name) else ""
            yield Found(folder + entry.name, key, entry.size)


class ZipSource:
    """Members of a zip archive, by name. A place is a member's name."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.location, self._folder, self._name = f"{folder.location}/{name}", folder, name
        self._open: zipfile.ZipFile | None = None

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        files: dict[str, Keys] = {}
        names: dict[str, Keys] = {}
        key_folders = {"": ""}
        for member in sorted(self._archive().infolist(), key=lambda member: member.filename):
            if member.is_dir():
                continue
            folder, _, base = member.filename.rpartition("/")
            known = ""
            for part in folder.split("/") if folder else ():
                inside = f"{known}{part}/"
                if inside not in key_folders:
                    own = names.setdefault(known, Keys()).of_folder(part or "_")
                    key_folders[inside] = f"{key_folders[known]}{own}/"
                known = inside
            key = key_folders[known] + files.setdefault(known, Keys()).of_file(base) if _is_image(base) else ""
            yield Found(member.filename, key, member.file_size)

    def read(self, place: str) -> Content:
        """See `Source`."""
        try:
            return Content(self._archive().read(place), _suffix(place))
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
            # Of one member: damaged, cut, gone; RuntimeError is encrypted or of an unknown compression.
            raise OSError(0, f"not readable in the archive ({error})") from error

    def name(self, place: str) -> str:
        """See `Source`."""
        return place

    def reads(self, place: str) -> int:
        """See `Source`. All come from one open file."""
        return 1

    def _archive(self) -> zipfile.ZipFile:
        if self._open is None:
            try:
                self._open = zipfile.ZipFile(self._folder.open(self._name))
            except (zipfile.BadZipFile, OSError) as error:
                raise InputError(f"{self.location}: not a whole zip archive ({error})") from error
        return self._open

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": None}  # every process opens its own


class TarSource:
    """Samples of tars, as WebDataset groups them; what comes with an image (json, txt) stays with it, a `cls` is its
    label. A place says in which tar which bytes are; keys begin with the tar's name: others repeat them between tars.
    """

    def __init__(self, location: str, folder: Folder, names: list[str]) -> None:
        self.location, self._folder, self._names = location, folder, names

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        for name in self._names:
            keys = Keys()
            with self._open(name) as file:
                for sample in walk(file, f"{self._folder.location}/{name}"):
                    yield self._found(name, sample, keys, file)

    def read(self, place: str) -> Content:
        """See `Source`."""
        where = json.loads(place)
        suffixes, spans = list(where["members"]), list(where["members"].values())
        members = dict(zip(suffixes, self._folder.read_spans(where["tar"], spans), strict=True))
        return Content(members.pop(where["image"]), where["image"].rpartition(".")[2], members)

    def name(self, place: str) -> str:
        """See `Source`."""
        where = json.loads(place)
        return f"{where['tar']}:{where['key']}.{where['image']}"

    def reads(self, place: str) -> int:
        """See `Source`."""
        return self._folder.reads

    def _open(self, name: str) -> BinaryIO:
        try:
            return self._folder.open(name)
        except OSError as error:
            raise InputError(f"{self._folder.location}/{name}: cannot be opened ({error.strerror})") from error

    def _found(self, tar: str, sample: TarSample, keys: Keys, file: BinaryIO) -> Found:
        image = next(iter(sample.images()), "")
        kept = {suffix: span for suffix, span in sample.members.items()
                if suffix == image or (suffix != "cls" and suffix not in sample.images())}
        place = json.dumps({"tar": tar, "key": sample.key, "image": image, "members": kept})
        if not image:
            return Found(json.dumps({"tar": tar, "key": sample.key, "image": "*", "members": {}}), "", 0)
        label = _bytes_at(file, *sample.members.get("cls", (0, 0))).decode("utf-8", "replace").strip()
        key = f"{Keys().of_folder(tar.removesuffix('.tar'))}/{keys.of_folder(sample.key)}"
        return Found(place, key, sample.members[image][1], label)


class ListSource:
    """Files that a list names: CSV with a header, JSON lines, or Parquet, with a column `path` (relative ones are below
    the list's folder; URLs may lead to any store). Other columns become the sample's json; one may be the label.
    """

    def __init__(self, folder: Folder, name: str, label_column: str) -> None:
        self.location, self._name, self._label_column = f"{folder.location}/{name}", name, label_column
        self._folder = folder
        self._stores: dict[str, Folder] = {}

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        for number, row in enumerate(self._rows()):
            if not isinstance(row, dict) or not isinstance(row.get("path"), str):
                raise InputError(f"{self.location}: row {number + 1} has no `path`; expected a column of that name")
            if self._label_column and row.get(self._label_column) in (None, ""):
                text = f"{self.location}: row {number + 1} has no `{self._label_column}`, which --labels asks for"
                raise InputError(text)
            label = str(row[self._label_column]) if self._label_column else ""
            name = row["path"].rpartition("/")[2]
            key = f"{number:010d}_{Keys().of_file(name)}" if _is_image(name) else ""
            folder, path = self._find(row["path"])
            try:
                size = folder.size(path)
            except OSError:
                size = -1
            yield Found(json.dumps(row, ensure_ascii=False, default=str), key, size, label)

    def read(self, place: str) -> Content:
        """See `Source`."""
        row = json.loads(place)
        others = {name: value for name, value in row.items() if name != "path"}
        extra = {"json": json.dumps(others, ensure_ascii=False).encode()} if others else {}
        folder, path = self._find(row["path"])
        return Content(folder.read(path), _suffix(path), extra)

    def name(self, place: str) -> str:
        """See `Source`."""
        return json.loads(place)["path"]

    def reads(self, place: str) -> int:
        """See `Source`."""
        return self._find(json.loads(place)["path"])[0].reads

    def _find(self, path: str) -> tuple[Folder, str]:
        """The folder that a path is read from, and its name there."""
        if not is_url(path):
            return self._folder, path
        scheme, _, rest = path.partition("://")
        host, _, name = rest.partition("/")
        root = f"{scheme}://{host}"
        if root not in self._stores:
            self._stores[root] = open_folder(root)
        return self._stores[root], unquote(name) if scheme.startswith("http") else name

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            with self._folder.open(self._name) as file:
                yield from _READERS[_suffix(self._name)](file)
        except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, pyarrow.ArrowException, OSError) as error:
            text = f"{self.location}: cannot be read ({' '.join(str(error).split())[:200]})"
            raise InputError(text) from error


def _read_csv(file: BinaryIO) -> Iterator[dict[str, Any]]:
    yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline=""))


def _read_json_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in io.TextIOWrapper(file, encoding="utf-8") if line.strip())


def _read_parquet(file: BinaryIO) -> Iterator[dict[str, Any]]:
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(65536):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[BinaryIO], Iterator[dict[str, Any]]]] = {
    "csv": _read_csv, "jsonl": _read_json_lines, "parquet": _read_parquet,
}


def _bytes_at(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _is_image(name: str) -> bool:
    return _suffix(name) in IMAGE_SUFFIXES
