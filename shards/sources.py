"""Where images come from: a folder, a zip archive, tars, a list of paths. Each lists its files in a fixed order and
reads any of them by what it listed.

Names inside archives are only ever keys: nothing is extracted, and a member of an archive never becomes a path.
"""

from __future__ import annotations

import csv
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shards.errors import InputError
from shards.keys import Keys
from shards.manifest import IMAGE_SUFFIXES
from shards.tar import TarSample, walk

_LISTS = (".csv", ".jsonl", ".parquet")


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
    """What can be converted."""

    path: Path

    def list(self) -> Iterator[Found]:
        """All files, in an order that is always the same. InputError: the source cannot be listed."""
        ...

    def read(self, place: str) -> Content:
        """One file. OSError: it cannot be read."""
        ...

    def name(self, place: str) -> str:
        """For people."""
        ...


def open_source(path: Path, *, label_column: str = "") -> Source:
    """The source at a path, by what is there: a folder of tars alone counts as tars.

    Raises:
        InputError: nothing is there, or nothing that can be converted.
    """
    suffix = path.suffix.lower()
    if path.is_file() and suffix == ".zip":
        return ZipSource(path)
    if path.is_file() and suffix in _LISTS:
        return ListSource(path, label_column)
    if path.is_file() and suffix == ".tar":
        return TarSource(path, [path])
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; pass a folder of images or of tars, a .zip, or a list ({_names()})")
    tars = sorted(path.glob("*.tar"))
    if tars and not any(entry.is_dir() or _is_image(entry.name) for entry in os.scandir(path)):
        return TarSource(path, tars)
    return FolderSource(path)


def _names() -> str:
    return ", ".join(_LISTS)


class FolderSource:
    """Files below a folder, depth first, each folder's in the order of their names; memory of one branch of folders.

    Links to files are followed, links to folders are not: they may lead in a circle. A place is a path below it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        yield from self._walk("", "")

    def read(self, place: str) -> Content:
        """See `Source`."""
        return Content((self.path / place).read_bytes(), _suffix(place))

    def name(self, place: str) -> str:
        """See `Source`."""
        return place

    def _walk(self, folder: str, key_folder: str) -> Iterator[Found]:
        try:
            with os.scandir(os.path.join(self.path, folder)) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            text = f"{error.filename}: cannot be listed ({error.strerror}); mend its permissions or move it away"
            raise InputError(text) from error
        files, folders = Keys(), Keys()
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(f"{folder}{entry.name}/", f"{key_folder}{folders.of_folder(entry.name)}/")
                continue
            is_image = _is_image(entry.name) and not (entry.is_symlink() and os.path.isdir(entry.path))
            key = key_folder + files.of_file(entry.name) if is_image else ""
            yield Found(folder + entry.name, key, _size(entry))


class ZipSource:
    """Members of a zip archive, by name. A place is a member's name."""

    def __init__(self, path: Path) -> None:
        self.path = path
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

    def _archive(self) -> zipfile.ZipFile:
        if self._open is None:
            try:
                self._open = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise InputError(f"{self.path}: not a whole zip archive ({error})") from error
        return self._open

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_open": None}  # every process opens its own


class TarSource:
    """Samples of tars, as WebDataset groups them; what comes with an image (json, txt) stays with it, a `cls` is its
    label. A place says in which tar which bytes are; keys begin with the tar's name: others repeat them between tars.
    """

    def __init__(self, path: Path, tars: list[Path]) -> None:
        self.path = path
        self._tars = {tar.name: tar for tar in tars}

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        for name, tar in self._tars.items():
            keys = Keys()
            with tar.open("rb") as file:
                for sample in walk(tar):
                    yield self._found(name, sample, keys, file)

    def read(self, place: str) -> Content:
        """See `Source`."""
        where = json.loads(place)
        with self._tars[where["tar"]].open("rb") as file:
            members = {suffix: _bytes_at(file, *span) for suffix, span in where["members"].items()}
        return Content(members.pop(where["image"]), where["image"].rpartition(".")[2], members)

    def name(self, place: str) -> str:
        """See `Source`."""
        where = json.loads(place)
        return f"{where['tar']}:{where['key']}.{where['image']}"

    def _found(self, tar: str, sample: TarSample, keys: Keys, file: Any) -> Found:
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
    """Files that a list names: CSV with a header, JSON lines, or Parquet, with a column `path` (relative paths are
    below the list's folder). Other columns become the sample's json; one of them may be the label.
    """

    def __init__(self, path: Path, label_column: str) -> None:
        self.path, self._label_column = path, label_column

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        for number, row in enumerate(self._rows()):
            if not isinstance(row, dict) or not isinstance(row.get("path"), str):
                raise InputError(f"{self.path}: row {number + 1} has no `path`; expected a column of that name")
            if self._label_column and row.get(self._label_column) in (None, ""):
                text = f"{self.path}: row {number + 1} has no `{self._label_column}`, which --labels asks for"
                raise InputError(text)
            label = str(row[self._label_column]) if self._label_column else ""
            name = row["path"].rpartition("/")[2]
            key = f"{number:010d}_{Keys().of_file(name)}" if _is_image(name) else ""
            try:
                size = self._file(row["path"]).stat().st_size
            except OSError:
                size = -1
            yield Found(json.dumps(row, ensure_ascii=False, default=str), key, size, label)

    def read(self, place: str) -> Content:
        """See `Source`."""
        row = json.loads(place)
        others = {name: value for name, value in row.items() if name != "path"}
        extra = {"json": json.dumps(others, ensure_ascii=False).encode()} if others else {}
        return Content(self._file(row["path"]).read_bytes(), _suffix(row["path"]), extra)

    def name(self, place: str) -> str:
        """See `Source`."""
        return json.loads(place)["path"]

    def _file(self, path: str) -> Path:
        return self.path.parent / path

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            yield from _READERS[self.path.suffix.lower()](self.path)
        except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
            raise InputError(f"{self.path}: cannot be read ({error})") from error


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        text = f"{path}: Parquet needs pyarrow; install it with `pip install 'largescale[parquet]'`"
        raise InputError(text) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(65536):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:200]})") from error


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".csv": _read_csv, ".jsonl": _read_json_lines, ".parquet": _read_parquet,
}


def _bytes_at(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _is_image(name: str) -> bool:
    return _suffix(name) in IMAGE_SUFFIXES


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link that leads nowhere; reading it will say so
        return -1
