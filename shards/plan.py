"""The plan of a conversion: what was listed, in which order it is written, cut into pieces of one shard each.

    plan/plan.json                 source, target, settings, parts, classes, fingerprint of the listing
    plan/places.bin, keys.bin      where in the source each file is, and its key, one after the other
    plan/*_ends.bin                where each of them ends (uint64)
    plan/labels.bin, sizes.bin     class (int32) and bytes (int64) of each
    plan/order.bin                 with --shuffle or --holdout: the row that comes at each place (uint64)
    plan/others.jsonl              files that are no images
    plan/scans/000012.safetensors  with --duplicates: hashes of the images of piece 12
    plan/duplicates.bin            row, the row it repeats, exact or near (uint64 [N, 3])
    plan/pieces/000012.json        piece 12 is written: its shard, and what it left out and why

Every process of a conversion, on any node, reads the same plan, so pieces are written by whoever comes, once, and a
conversion goes on where it was killed. Rows are read from the disk as they are needed.

A part is a stretch of places that goes to one split; pieces do not cross parts. The first listing is one part, or two
with --holdout; each update adds the files that are new as further parts, and leaves all earlier pieces as they are.

Memory: next to none, whatever the number of files; 40 bytes a listed file while a plan is updated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shards.duplicates import find_duplicates
from shards.errors import InputError
from shards.files import atomic_write
from shards.labels import class_names
from shards.manifest import IMAGE_SUFFIXES, ShardEntry
from shards.shuffle import append, append_shuffled
from shards.sources import Found, Source, open_source

PLAN, PLAN_IN_WORK = "plan", ".plan.writing"
TRAIN, HOLDOUT = "train", "holdout"

_LABELS_AT_ONCE = 2**18

_SETTINGS_KEPT = "was made with {key}={was}, now it is {now}; give the same options, or --force to begin anew"


@dataclass(frozen=True)
class Row:
    """One file to convert: its number in the listing, its place in the source, its key, its class (-1 for none)."""

    number: int
    place: str
    key: str
    label: int


@dataclass(frozen=True)
class Written:
    """What came of a piece: its shard (None if nothing of it could be used), and what was left out: a dictionary a file
    with `source` and `reason`, and of a duplicate `repeats`.
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
        """Files."""
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
        numbers = self._order[first:last] if self._order is not None else np.arange(first, last)
        return [Row(number, self._places[number], self._keys[number], int(self._labels[number]))
                for number in numbers.tolist()]

    def written(self, piece: int) -> Written | None:
        """What came of a piece; None if it is not written."""
        try:
            content = json.loads(self._piece_file(piece).read_bytes())
        except FileNotFoundError:
            return None
        entry = ShardEntry(**content["entry"]) if content["entry"] else None
        return Written(entry, content["skipped"])

    def record(self, piece: int, written: Written) -> None:
        """Say that a piece is written: last, after its files."""
        entry = vars(written.entry) if written.entry else None
        with atomic_write(self._piece_file(piece)) as file:
            file.write(json.dumps({"entry": entry, "skipped": written.skipped}).encode())

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
        found = find_duplicates(scans, self.folder / ".duplicates", radius)
        with atomic_write(self.folder / "duplicates.bin") as file:
            file.write(found.tobytes())

    def repeated(self, rows: list[Row]) -> dict[int, tuple[str, str]]:
        """For those of these rows that are duplicates: what each repeats, and the reason."""
        found = self._duplicates
        numbers = np.array([row.number for row in rows], np.uint64)
        places = np.searchsorted(found[:, 0], numbers)
        hits = np.flatnonzero(found[np.minimum(places, len(found) - 1), 0] == numbers) if len(found) else []
        return {
            rows[hit].number: (printable(self.source.name(self._places[int(found[places[hit], 1])])),
                               "a near duplicate" if found[places[hit], 2] else "a duplicate")
            for hit in hits
        }

    @cached_property
    def _duplicates(self) -> np.ndarray:
        path = self.folder / "duplicates.bin"
        if not path.exists() or path.stat().st_size == 0:
            return np.empty((0, 3), np.uint64)
        return np.memmap(path, np.uint64, "r").reshape(-1, 3)

    def others(self) -> Iterator[str]:
        """Files that are no images."""
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
    def _places(self) -> _Texts:
        return _Texts(self.folder, "places")

    @cached_property
    def _keys(self) -> _Texts:
        return _Texts(self.folder, "keys")

    @cached_property
    def _labels(self) -> np.ndarray:
        return np.memmap(self.folder / "labels.bin", np.int32, "r")

    @cached_property
    def _order(self) -> np.ndarray | None:
        path = self.folder / "order.bin"
        return np.memmap(path, np.uint64, "r") if path.exists() else None


def make_plan(source: Source, home: Path, settings: dict[str, Any], target: str = "") -> Plan:
    """List a source and write the plan.

    Args:
        source: what to list.
        home: folder of the conversion; the plan goes below it.
        settings: must have `samples_per_shard`, `shuffle`, `holdout` and `labels`.
        target: see `Plan`.

    Raises:
        InputError: no images, or with labels images that lie in no class folder.
    """
    temporary = home / PLAN_IN_WORK
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pieces").mkdir(parents=True)
    try:
        _add_listing(Plan(temporary, source, target, settings, (), (), ""))
        os.replace(temporary, home / PLAN)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_plan(home, source)


def update_plan(plan: Plan) -> tuple[Plan, int]:
    """Add the files that the source has got since it was listed; pieces that were there stay as they are.

    Returns:
        The plan, and how many listed files the source no longer has: what was made of them stays.

    Raises:
        InputError: a listed file changed its size.
    """
    gone = _add_listing(plan)
    return open_plan(plan.folder.parent, plan.source), gone


def open_plan(home: Path, source: Source | None = None) -> Plan:
    """The plan of a conversion.

    Args:
        home: its folder, or the folder below it of what is held out.
        source: where the images are now; None is where they were.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if home.name == HOLDOUT and not (home / PLAN).exists():
        home = home.parent
    path = home / PLAN / "plan.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        source = source or open_source(content["source"], label_column=label_column(settings["labels"]))
        return Plan(home / PLAN, source, content["target"], settings, tuple(Part(**part) for part in content["parts"]),
                    tuple(content["classes"]), content["fingerprint"])
    except FileNotFoundError:
        text = f"{home}: no conversion was planned here; begin with `shards convert SRC {home}`, or its --task 0/N"
        raise InputError(text) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); begin anew with --force") from error


def check_settings(plan: Plan, settings: dict[str, Any]) -> None:
    """Check that a plan was made with these options; every task does.

    Raises:
        InputError: naming the first option that differs.
    """
    for key, now in settings.items():
        if plan.settings.get(key) != now:
            text = _SETTINGS_KEPT.format(key=f"--{key.replace('_', '-')}", was=plan.settings.get(key), now=now)
            raise InputError(f"{plan.folder}: {text}")


def check_listing(plan: Plan) -> None:
    """Check that the source still has what the plan lists.

    Raises:
        InputError: files that came, went or changed their size since.
    """
    digest = xxhash.xxh3_128()
    count = sum(_add(digest, found) for found in plan.source.list())
    if digest.hexdigest() != plan.fingerprint:
        raise InputError(
            f"{plan.source.location}: is not what it was when {plan.folder} was made ({plan.num_rows:,} images then, "
            f"{count:,} now, or other names or sizes); restore it, add what is new with --update, or begin anew with "
            f"--force"
        )


def _add_listing(plan: Plan) -> int:
    """List the source and append what the plan does not have; returns how many files of the plan are gone."""
    source, folder, first = plan.source, plan.folder, plan.num_rows
    _cut(folder, first)
    known = _Known(plan) if first else None
    digest = xxhash.xxh3_128()
    numbers: dict[str, int] = {"": -1}
    counts = {TRAIN: 0, HOLDOUT: 0}
    num_others = 0
    with (_TextFile(folder, "places") as places, _TextFile(folder, "keys") as keys,
          (folder / "classes.new").open("wb") as labels, (folder / "sizes.bin").open("ab") as sizes,
          (folder / f"{TRAIN}.new").open("wb") as train, (folder / f"{HOLDOUT}.new").open("wb") as holdout,
          atomic_write(folder / "others.jsonl") as others):
        for found in source.list():
            if not _add(digest, found):
                others.write((json.dumps(printable(source.name(found.place))) + "\n").encode())
                num_others += 1
                continue
            if known and known.has(found):
                continue
            key = (known.free(found.key) if known else found.key).encode("utf-8", "surrogateescape")
            places.add(os.fsencode(found.place))
            keys.add(key)
            label = numbers.setdefault(_class_of(source, found, plan.settings["labels"]), len(numbers) - 1)
            labels.write(label.to_bytes(4, "little", signed=True))
            sizes.write(found.size.to_bytes(8, "little", signed=True))
            is_held = is_held_out(key, plan.settings["holdout"])
            (holdout if is_held else train).write((first + sum(counts.values())).to_bytes(8, "little"))
            counts[HOLDOUT if is_held else TRAIN] += 1
    added = sum(counts.values())
    if first + added == 0:
        raise InputError(
            f"{source.location}: no images below this folder (looked for {', '.join(IMAGE_SUFFIXES)}; {num_others} "
            f"other files); pass the folder that holds them"
        )
    classes = class_names(numbers, plan.classes)
    _append_labels(folder, numbers, classes)
    _append_order(plan)
    if added:
        (folder / "duplicates.bin").unlink(missing_ok=True)  # new ones may repeat old ones, or each other
    parts = [*plan.parts, *(Part(split, rows) for split, rows in counts.items() if rows)]
    content = {"source": source.location, "target": plan.target, "settings": plan.settings, "classes": classes,
               "parts": [vars(part) for part in parts], "fingerprint": digest.hexdigest()}
    with atomic_write(folder / "plan.json") as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return known.num_gone() if known else 0


def _append_order(plan: Plan) -> None:
    """Put new rows in order: those that are held out come last."""
    first, seed = plan.num_rows, plan.settings["shuffle"]
    new = [plan.folder / f"{split}.new" for split in (TRAIN, HOLDOUT)]
    if seed is not None or plan.settings["holdout"]:
        with (plan.folder / "order.bin").open("ab") as file:
            for number, rows in enumerate(new):
                if seed is None:
                    append(rows, file)
                else:
                    append_shuffled(rows, file, [seed, number, first], plan.folder / "buckets")
    for rows in new:
        rows.unlink()


def is_held_out(key: bytes, share: float) -> bool:
    """Whether the sample with this key belongs to the `share` that is held out: the same in every corpus."""
    return xxhash.xxh3_64_intdigest(key) < share * 2**64


def _cut(folder: Path, rows: int) -> None:
    """Shorten the files of a plan to so many rows: what lies beyond was left by an update that was killed."""
    if not rows:
        return
    for name, width in (("labels", 4), ("sizes", 8), ("order", 8), ("place_ends", 8), ("key_ends", 8)):
        if (folder / f"{name}.bin").exists():
            os.truncate(folder / f"{name}.bin", rows * width)
    for name in ("place", "key"):
        end = np.fromfile(folder / f"{name}_ends.bin", np.uint64, 1, offset=8 * (rows - 1))
        os.truncate(folder / f"{name}s.bin", int(end[0]))


def _add(digest: xxhash.xxh3_128, found: Found) -> bool:
    """Count an image into the fingerprint of its listing; False for what is none."""
    if not found.key:
        return False
    digest.update(os.fsencode(found.place) + b"\0%d\n" % found.size)
    return True


def label_column(labels: str) -> str:
    """The column of a list that holds the classes; empty if it is none."""
    return labels.removeprefix("column:") if labels.startswith("column:") else ""


def _class_of(source: Source, found: Found, labels: str) -> str:
    """The class of a file; empty for none."""
    if labels != "folder":
        return printable(found.label) if labels != "none" else ""
    folder, slash, _ = source.name(found.place).partition("/")
    if not slash:
        raise InputError(
            f"{source.location}/{printable(found.place)}: lies in no class folder, which --labels folder needs; move "
            f"it into one, or convert without labels"
        )
    return printable(folder)


def printable(name: str) -> str:
    """Names that are not UTF-8 come from the file system with surrogates, which no file format takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _append_labels(folder: Path, numbers: dict[str, int], classes: tuple[str, ...]) -> None:
    """Class numbers by name, whatever the order in which they were met."""
    place = {name: number for number, name in enumerate(classes)}
    final = np.full(len(numbers), -1, np.int32)
    for name, number in numbers.items():
        if name:
            final[number] = place[name]
    with (folder / "labels.bin").open("ab") as file, (folder / "classes.new").open("rb") as new:
        while len(labels := np.fromfile(new, np.int32, _LABELS_AT_ONCE)):
            final[labels].tofile(file)  # -1 picks the last one, which is -1
    (folder / "classes.new").unlink()


class _Known:
    """What a plan lists already: found by hashes of places and of keys."""

    def __init__(self, plan: Plan) -> None:
        self._places, self._source = plan._places, plan.source
        self._sizes = np.fromfile(plan.folder / "sizes.bin", np.int64, plan.num_rows)
        hashes = self._hashes(plan._places, plan.num_rows)
        self._rows = np.argsort(hashes)
        self._hashes_of_places = hashes[self._rows]
        self._hashes_of_keys = np.sort(self._hashes(plan._keys, plan.num_rows))
        self._suffix = f"~u{len(plan.parts)}"
        self._seen = 0

    def has(self, found: Found) -> bool:
        """Whether a file is listed. InputError: with another size."""
        place = os.fsencode(found.place)
        at = np.uint64(xxhash.xxh3_64_intdigest(place))
        for number in range(*(int(np.searchsorted(self._hashes_of_places, at, side)) for side in ("left", "right"))):
            row = int(self._rows[number])
            if self._places.raw(row) == place:
                if self._sizes[row] != found.size:
                    raise InputError(
                        f"{self._source.location}: {self._source.name(found.place)} was {self._sizes[row]:,} bytes "
                        f"and is {found.size:,} now; --update adds files, for changed ones begin anew with --force"
                    )
                self._seen += 1
                return True
        return False

    def free(self, key: str) -> str:
        """A key that no listed file has. Keys of a listing never contain what is added here."""
        at = np.uint64(xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape")))
        place = np.searchsorted(self._hashes_of_keys, at)
        taken = place < len(self._hashes_of_keys) and self._hashes_of_keys[place] == at
        return key + self._suffix if taken else key

    def num_gone(self) -> int:
        """How many of the listed files were not asked for."""
        return len(self._rows) - self._seen

    @staticmethod
    def _hashes(texts: _Texts, rows: int) -> np.ndarray:
        return np.fromiter((xxhash.xxh3_64_intdigest(texts.raw(row)) for row in range(rows)), np.uint64, rows)


class _TextFile:
    """Appends texts one after the other to `places.bin` (or `keys.bin`), and where each ends to `place_ends.bin`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._texts = (folder / f"{name}.bin").open("ab")
        self._ends = (folder / f"{name[:-1]}_ends.bin").open("ab")
        self._place = self._texts.tell()

    def add(self, text: bytes) -> None:
        """Append one."""
        self._texts.write(text)
        self._place += len(text)
        self._ends.write(self._place.to_bytes(8, "little"))

    def __enter__(self) -> _TextFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._texts.close()
        self._ends.close()


class _Texts:
    """Texts of a `_TextFile`, read from the disk one by one."""

    def __init__(self, folder: Path, name: str) -> None:
        self._texts = np.memmap(folder / f"{name}.bin", np.uint8, "r")
        self._ends = np.memmap(folder / f"{name[:-1]}_ends.bin", np.uint64, "r")

    def raw(self, row: int) -> bytes:
        """The bytes of one."""
        start = int(self._ends[row - 1]) if row else 0
        return self._texts[start : int(self._ends[row])].tobytes()

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.raw(row))
