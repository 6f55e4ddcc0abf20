"""The plan of a conversion: what was listed, in which order it is written, cut into pieces of one shard each.

    plan/plan.json                 source, settings, counts, classes, fingerprint of the listing
    plan/places.bin, keys.bin      where in the source each file is, and its key, one after the other
    plan/*_ends.bin, labels.bin    where each ends (uint64), class of each (int32)
    plan/order.bin                 with --shuffle: the row that comes at each place (uint64)
    plan/others.jsonl              files that are no images
    plan/scans/000012.safetensors  with --duplicates: hashes of the images of piece 12
    plan/duplicates.bin            row, the row it repeats, exact or near (uint64 [N, 3])
    plan/pieces/000012.json        piece 12 is written: its shard, and what it left out and why

Every process of a conversion, on any node, reads the same plan, so pieces are written by whoever comes, once, and a
conversion goes on where it was killed. Rows are read from the disk as they are needed; making a plan takes 8 bytes of
memory a file where it is shuffled, and next to none where not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from shards.sources import Found, Source, open_source

PLAN, PLAN_IN_WORK = "plan", ".plan.writing"

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
class Plan:
    """A plan on disk.

    Attributes:
        folder: where it is.
        source: what it lists.
        settings: the options that decide about bytes.
        num_rows, piece_rows: files, and how many of them make a piece.
        classes: names by number.
        fingerprint: of paths and sizes.
    """

    folder: Path
    source: Source
    settings: dict[str, Any]
    num_rows: int
    piece_rows: int
    classes: tuple[str, ...]
    fingerprint: str

    @property
    def num_pieces(self) -> int:
        """Pieces, the last of which may be smaller."""
        return -(-self.num_rows // self.piece_rows)

    def num_rows_of(self, piece: int) -> int:
        """How many files a piece has."""
        return min(self.piece_rows, self.num_rows - piece * self.piece_rows)

    def rows(self, piece: int) -> list[Row]:
        """The files of a piece, in their order."""
        first = piece * self.piece_rows
        last = first + self.num_rows_of(piece)
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

    def _piece_file(self, piece: int) -> Path:
        return self.folder / "pieces" / f"{piece:06d}.json"

    @cached_property
    def _places(self) -> _Texts:
        return _Texts(self.folder, "places", "place_ends")

    @cached_property
    def _keys(self) -> _Texts:
        return _Texts(self.folder, "keys", "key_ends")

    @cached_property
    def _labels(self) -> np.ndarray:
        return np.memmap(self.folder / "labels.bin", np.int32, "r")

    @cached_property
    def _order(self) -> np.ndarray | None:
        path = self.folder / "order.bin"
        return np.memmap(path, np.uint64, "r") if path.exists() else None


def make_plan(source: Source, out: Path, settings: dict[str, Any]) -> Plan:
    """List a source and write the plan.

    Args:
        source: what to list.
        out: shard folder that is to come; the plan goes below it.
        settings: must have `samples_per_shard`, `shuffle` and `labels`.

    Raises:
        InputError: no images, or with labels images that lie in no class folder.
    """
    temporary = out / PLAN_IN_WORK
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pieces").mkdir(parents=True)
    try:
        plan = _write_listing(source, temporary, settings)
        os.replace(temporary, out / PLAN)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_plan(out, plan.source)


def open_plan(out: Path, source: Source | None = None) -> Plan:
    """The plan of a shard folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = out / PLAN / "plan.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        source = source or open_source(Path(content["source"]), label_column=label_column(settings["labels"]))
        return Plan(out / PLAN, source, settings, content["rows"], settings["samples_per_shard"],
                    tuple(content["classes"]), content["fingerprint"])
    except FileNotFoundError:
        text = f"{out}: no conversion was planned here; begin with `shards convert SRC {out}`, or its --task 0/N"
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


def check_listing(plan: Plan, source: Source) -> None:
    """Check that a source still has what the plan lists.

    Raises:
        InputError: files that came, went or changed their size since.
    """
    digest = xxhash.xxh3_128()
    count = sum(_add(digest, found) for found in source.list())
    if digest.hexdigest() != plan.fingerprint:
        raise InputError(
            f"{source.path}: is not what it was when {plan.folder} was made ({plan.num_rows:,} images then, {count:,} "
            f"now, or other names or sizes); restore it, or begin anew with --force"
        )


def _write_listing(source: Source, folder: Path, settings: dict[str, Any]) -> Plan:
    digest = xxhash.xxh3_128()
    numbers: dict[str, int] = {"": -1}
    count = num_others = 0
    with (_TextFile(folder, "places", "place_ends") as places, _TextFile(folder, "keys", "key_ends") as keys,
          (folder / "classes.bin").open("wb") as labels, (folder / "others.jsonl").open("w") as others):
        for found in source.list():
            if not _add(digest, found):
                others.write(json.dumps(printable(source.name(found.place))) + "\n")
                num_others += 1
                continue
            places.add(os.fsencode(found.place))
            keys.add(found.key.encode("utf-8", "surrogateescape"))
            label = numbers.setdefault(_class_of(source, found, settings["labels"]), len(numbers) - 1)
            labels.write(np.int32(label).tobytes())
            count += 1
    if count == 0:
        raise InputError(
            f"{source.path}: no images below this folder (looked for {', '.join(IMAGE_SUFFIXES)}; {num_others} other "
            f"files); pass the folder that holds them"
        )
    classes = class_names(numbers)
    _sort_labels(folder, numbers, classes)
    if settings["shuffle"] is not None:
        order = np.random.default_rng(settings["shuffle"]).permutation(count)
        order.astype(np.uint64).tofile(folder / "order.bin")
    content = {"source": os.path.abspath(source.path), "settings": settings, "rows": count, "classes": classes,
               "fingerprint": digest.hexdigest()}
    (folder / "plan.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Plan(folder, source, settings, count, settings["samples_per_shard"], classes, digest.hexdigest())


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
            f"{source.path / found.place}: lies in no class folder, which --labels folder needs; move it into one, or "
            f"convert without labels"
        )
    return printable(folder)


def printable(name: str) -> str:
    """Names that are not UTF-8 come from the file system with surrogates, which no file format takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _sort_labels(folder: Path, numbers: dict[str, int], classes: Iterable[str]) -> None:
    """Class numbers by name, whatever the order in which they were met."""
    place = {name: number for number, name in enumerate(classes)}
    sorted_number = np.full(len(numbers), -1, np.int32)
    for name, number in numbers.items():
        if name:
            sorted_number[number] = place[name]
    labels = np.fromfile(folder / "classes.bin", np.int32)
    sorted_number[labels].tofile(folder / "labels.bin")  # -1 picks the last one, which is -1
    (folder / "classes.bin").unlink()


class _TextFile:
    """Writes texts one after the other, and where each ends."""

    def __init__(self, folder: Path, name: str, ends: str) -> None:
        self._texts, self._ends = (folder / f"{name}.bin").open("wb"), (folder / f"{ends}.bin").open("wb")
        self._place = 0

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

    def __init__(self, folder: Path, name: str, ends: str) -> None:
        self._texts = np.memmap(folder / f"{name}.bin", np.uint8, "r")
        self._ends = np.memmap(folder / f"{ends}.bin", np.uint64, "r")

    def __getitem__(self, row: int) -> str:
        start = int(self._ends[row - 1]) if row else 0
        return os.fsdecode(self._texts[start : int(self._ends[row])].tobytes())
