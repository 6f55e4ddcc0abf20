"""The plan of a conversion: what was listed and in what order it is written, cut into pieces of one shard each.

    plan/plan.json                 source and its kind, target, settings, parts, classes, fingerprint of the listing
    plan/places.bin, keys.bin      where in the source each file is, and its key, one after the other
    plan/*_ends.bin                where each of them ends (uint64)
    plan/labels.bin, sizes.bin     class (int32) and bytes (int64) of each
    plan/order.bin                 with --shuffle or --holdout: the row that comes at each place (uint64)
    plan/others.jsonl              files that are left out before they are read, and why
    plan/scans/000012.safetensors  with --duplicates: hashes of the images of piece 12
    plan/duplicates.bin            row, the row it repeats, exact or near (uint64 [N, 3])
s/000012.json        piece 12 is written: its shard, and what it left out and why

Every process of a conversion, on any node, reads the same plan, so any of them can write any piece, and a conversion
continues where it was killed. Rows are read from disk as needed. listing.py writes the plan.

A part is a stretch of places that goes to one split; pieces do not cross parts. The first listing is one part, or two
with --holdout; each update adds the files that are new as further parts, and leaves all earlier pieces as they are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.cleaning.duplicates import find_duplicates
from shards.format.labels import named
from shards.format.manifest import ShardEntry
from shards.ground.errors import InputError
from shards.ground.files import atomic_write, remove_partial_files
from shards.sources.clip_source import open_clip_source, open_clips_as
from shards.sources.source import IN_FOLDERS, Source, open_as, open_source
from shards.stores.store import is_url

PLAN, PLAN_IN_WORK = "plan", ".plan.writing"
TRAIN, HOLDOUT = "train", "holdout"
_SORTING = ".duplicates"

_SETTINGS_KEPT = "was made with {key}={was}, now it is {now}; pass the same options, or --force to start over"


@dataclass(frozen=True)
class Row:
    """One file to convert: its number in the listing, its place in the source, its key, its class (-1 for none)."""

    number: int
    place: str
    key: str
    label: int


@dataclass(frozen=True)
class Written:
    """The result of a piece: its shard (None if nothing in it could be used), and what was left out: one dictionary per
    file with `source` and `reason`, and for a duplicate `repeats`.
    """

    entry: ShardEntry | None
    skipped: list[dict[str, str]]


@dataclass(frozen=True)
class Part:
    """A stretch of a plan: the split that it goes to, and how many files it has."""

    split: str
    rows: int


@dataclass(frozen=True)
class Plan:
    """A plan on disk.

    Attributes:
        folder: where it is.
        source: what it lists.
        target: URL that the shards go to; empty if they stay beside the plan.
        settings: the options that decide about bytes.
        parts: what it is made of, in order.
        classes: names by number.
        fingerprint: of paths and sizes.
    """

    folder: Path
    source: Source
    target: str
    settings: dict[str, Any]
    parts: tuple[Part, ...]
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Number of files."""
        return sum(part.rows for part in self.parts)

    @property
    def num_pieces(self) -> int:
        """Pieces; the last one of a part may be smaller than the others."""
        return sum(self._num_pieces_of(part) for part in self.parts)

    def num_rows_of(self, piece: int) -> int:
        """How many files a piece has."""
        _, first, last = self._stretch(piece)
        return last - first

    def split(self, piece: int) -> str:
        """The split that a piece goes to."""
        return self._stretch(piece)[0].split

    def rows(self, piece: int) -> list[Row]:
        """The files of a piece, in their order."""
        _, first, last = self._stretch(piece)
        numbers = np.arange(first, last)
        if (order := self.folder / "order.bin").exists():
            numbers = np.fromfile(order, np.uint64, last - first, offset=8 * first)
        return [Row(number, self.places[number], self.keys[number], self._label(number)) for number in numbers.tolist()]

    def written(self, piece: int) -> Written | None:
        """What came of a piece; None if it is not written."""
        try:
            content = json.loads(self._piece_file(piece).read_bytes())
        except (FileNotFoundError, ValueError):  # not there, or lost its end with the power: then it is written again
            return None
        entry = ShardEntry(**content["entry"]) if content["entry"] else None
        return Written(entry, content["skipped"])

    def record(self, piece: int, written: Written) -> None:
        """Record that a piece is written; called last, after its files."""
        entry = vars(written.entry) if written.entry else None
        with atomic_write(self._piece_file(piece), durable=False) as file:
            file.write(json.dumps({"entry": entry, "skipped": written.skipped}).encode())

    def remove_leftovers(self) -> None:
        """Remove what killed processes left in the plan, or in place of another one; no process may be at work."""
        for folder in (self.folder, self.folder / "pieces", self.folder / "scans"):
            remove_partial_files(folder)
        for folder in (self.folder / _SORTING, self.folder.with_name(PLAN_IN_WORK)):
            shutil.rmtree(folder, ignore_errors=True)
        for leftover in self.folder.glob("*.new"):
            leftover.unlink()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # not what was read of it

    # -- Duplicates ---------------------------------------------------------------------------------------------------

    def scan_file(self, piece: int) -> Path:
        """Where the hashes of a piece's images are."""
        return self.folder / "scans" / f"{piece:06d}.safetensors"

    def are_duplicates_known(self) -> bool:
        """Whether duplicates were looked for."""
        return (self.folder / "duplicates.bin").exists()

    def find_duplicates(self, radius: int | None) -> None:
        """Look for duplicates among all scans and write them down."""
        scans = [self.scan_file(piece) for piece in range(self.num_pieces)]
        with atomic_write(self.folder / "duplicates.bin") as file:
            for found in find_duplicates(scans, self.folder / _SORTING, radius):
                file.write(found.tobytes())

    def repeated(self, rows: list[Row]) -> dict[int, tuple[str, str]]:
        """For those of these rows that are duplicates: what each repeats, and the reason."""
        found = self._duplicates
        numbers = np.array([row.number for row in rows], np.uint64)
        places = np.searchsorted(found[:, 0], numbers)
        is_hit = found[np.minimum(places, len(found) - 1), 0] == numbers if len(found) else np.zeros(0, bool)
        return {
            rows[hit].number: (
                printable(self.source.name(self.places[int(found[places[hit], 1])])),
                "a near duplicate" if found[places[hit], 2] else "a duplicate",
            )
            for hit in np.flatnonzero(is_hit)
        }

    @cached_property
    def _duplicates(self) -> np.ndarray:
        path = self.folder / "duplicates.bin"
        if not path.exists() or path.stat().st_size == 0:
            return np.empty((0, 3), np.uint64)
        return np.memmap(path, np.uint64, "r").reshape(-1, 3)

    def others(self) -> Iterator[dict[str, str]]:
        """Files that were left out before they were read: `source` and `reason` of each."""
        with (self.folder / "others.jsonl").open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    def _num_pieces_of(self, part: Part) -> int:
        return -(-part.rows // self.settings["samples_per_shard"])

    def _stretch(self, piece: int) -> tuple[Part, int, int]:
        """The part of a piece, and its first and last place."""
        first_piece = first_place = 0
        for part in self.parts:
            if piece < first_piece + self._num_pieces_of(part):
                first = first_place + (piece - first_piece) * self.settings["samples_per_shard"]
                return part, first, min(first + self.settings["samples_per_shard"], first_place + part.rows)
            first_piece, first_place = first_piece + self._num_pieces_of(part), first_place + part.rows
        raise IndexError(f"piece {piece} of {self.num_pieces}")

    def _piece_file(self, piece: int) -> Path:
        return self.folder / "pieces" / f"{piece:06d}.json"

    @cached_property
    def places(self) -> Texts:
        """Where in the source each file is."""
        return Texts(self.folder, "places")

    @cached_property
    def keys(self) -> Texts:
        """The key of each file."""
        return Texts(self.folder, "keys")

    @cached_property
    def _labels(self) -> BinaryIO:
        return (self.folder / "labels.bin").open("rb")

    def _label(self, row: int) -> int:
        return int.from_bytes(os.pread(self._labels.fileno(), 4, 4 * row), "little", signed=True)


def open_plan(home: Path, source: Source | None = None) -> Plan:
    """The plan of a conversion.

    Args:
        home: its folder, or the folder below it of what is held out.
        source: where the images are now; None is where they were, and does not look whether they still are.

    Raises:
        InputError: there is none, it cannot be read, or its tables are not whole.
    """
    if home.name == HOLDOUT and not (home / PLAN).exists():
        home = home.parent
    path = home / PLAN / "plan.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        source = source or source_for(content["source"], settings, content.get("kind", ""))
        plan = Plan(
            home / PLAN,
            source,
            content["target"],
            settings,
            tuple(Part(**part) for part in content["parts"]),
            tuple(content["classes"]),
            content["fingerprint"],
        )
    except FileNotFoundError:
        text = f"{home}: no conversion was planned here; start with `shards convert SRC {home}`, or its --task 0/N"
        raise InputError(text) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); start over with --force") from error
    _check_tables(plan)
    return plan


def _check_tables(plan: Plan) -> None:
    """Check that every table has all rows of the plan; an update that was killed may have left more."""
    rows = plan.num_rows
    needed = {"place_ends": 8 * rows, "key_ends": 8 * rows, "labels": 4 * rows, "sizes": 8 * rows}
    if plan.settings["shuffle"] is not None or plan.settings["holdout"]:
        needed["order"] = 8 * rows
    for name, size in needed.items():
        _check_size(plan.folder / f"{name}.bin", size)
    for name in ("place", "key"):
        [end] = np.fromfile(plan.folder / f"{name}_ends.bin", np.uint64, 1, offset=8 * (rows - 1))
        _check_size(plan.folder / f"{name}s.bin", int(end))


def _check_size(table: Path, needed: int) -> None:
    size = table.stat().st_size if table.exists() else 0
    if size < needed:
        raise InputError(
            f"{table}: has {size:,} bytes, the plan needs {needed:,}: it was cut, by a crash or a copy; restore it, or "
            f"start over with --force"
        )


def source_for(location: str | Path, settings: dict[str, Any], kind: str = "") -> Source:
    """The source that these settings of a plan want: of images, or of clips.

    Args:
        location: path or URL.
        settings: of the plan.
        kind: what is there, where that is known: then nothing is looked at.

    Raises:
        InputError: nothing is there, or nothing that can be converted.
    """
    column, clips = label_column(settings["labels"]), bool(settings.get("clips"))
    if kind:
        return (open_clips_as if clips else open_as)(kind, str(location), label_column=column)
    return (open_clip_source if clips else open_source)(location, label_column=column)


def planned_source(home: Path, location: str | Path, settings: dict[str, Any]) -> Source:
    """The source at a location, by what the plan knows of it if it lists just that: a folder of millions of files is
    not looked through by each of many tasks to learn that it is one.

    Raises:
        InputError: nothing is there, or nothing that can be converted.
    """
    try:
        content = json.loads((home / PLAN / "plan.json").read_text(encoding="utf-8"))
        kind, planned = content.get("kind", ""), content["source"]
    except (OSError, ValueError, KeyError):  # none yet, or reported when it is opened
        return source_for(location, settings)
    is_there = is_url(str(location)) or (os.path.isdir if kind in IN_FOLDERS else os.path.isfile)(location)
    if kind and is_there and (source := source_for(location, settings, kind)).location == planned:
        return source
    return source_for(location, settings)


def check_settings(plan: Plan, settings: dict[str, Any]) -> None:
    """Check that a plan was made with these options; every task does. Names of classes decide about no byte of a shard.

    Raises:
        InputError: naming the first option that differs.
    """
    for key, now in settings.items():
        if key != "class_names" and plan.settings.get(key) != now:
            text = _SETTINGS_KEPT.format(key=f"--{key.replace('_', '-')}", was=plan.settings.get(key), now=now)
            raise InputError(f"{plan.folder}: {text}")


def write_plan(folder: Path, content: dict[str, Any]) -> None:
    """Write plan.json atomically."""
    with atomic_write(folder / "plan.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())  # all ASCII: paths need not be text


def rename_classes(plan: Plan, names: list[str]) -> Plan:
    """The plan with these names of its classes, if any; written down if they are new: no shard depends on them.

    Raises:
        InputError: they do not fit, and nothing is written.
    """
    if not names or names == plan.settings.get("class_names"):
        return plan
    named(plan.classes, names)
    content = json.loads((plan.folder / "plan.json").read_text(encoding="utf-8"))
    content["settings"]["class_names"] = names
    write_plan(plan.folder, content)
    return replace(plan, settings=content["settings"])


def label_column(labels: str) -> str:
    """The column of a list that holds the classes; empty if it is none."""
    return labels.removeprefix("column:") if labels.startswith("column:") else ""


def printable(name: str) -> str:
    """Names that are not UTF-8 come from the file system with surrogates, which no file format takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Texts:
    """Texts of a plan, one after the other in a file: read from the disk one by one, and not kept."""

    def __init__(self, folder: Path, name: str) -> None:
        self._texts = (folder / f"{name}.bin").open("rb")
        self._ends = (folder / f"{name[:-1]}_ends.bin").open("rb")

    def raw(self, row: int) -> bytes:
        """The bytes of one text."""
        ends = os.pread(self._ends.fileno(), 16 if row else 8, 8 * max(0, row - 1))
        start = int.from_bytes(ends[:8], "little") if row else 0
        return os.pread(self._texts.fileno(), int.from_bytes(ends[-8:], "little") - start, start)

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.raw(row))
