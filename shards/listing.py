"""Lists a source into a plan (see plan.py), or appends what has come since.

Memory: next to none, whatever the number of files; 40 bytes a listed file while a plan is updated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shards.errors import InputError
from shards.files import atomic_write
from shards.labels import class_names
from shards.manifest import IMAGE_SUFFIXES
from shards.plan import HOLDOUT, PLAN, PLAN_IN_WORK, TRAIN, Part, Plan, Texts, open_plan, printable
from shards.shuffle import append, append_shuffled
from shards.sources import Found, Source

_LABELS_AT_ONCE = 2**18


def make_plan(
    source: Source, home: Path, settings: dict[str, Any], target: str = "", clear: Callable[[], None] = lambda: None
) -> Plan:
    """List a source and write the plan.

    Args:
        source: what to list.
        home: folder of the conversion; the plan goes below it.
        settings: must have `samples_per_shard`, `shuffle`, `holdout` and `labels`.
        target: see `Plan`.
        clear: removes what an earlier conversion left; called when the source is known to be one that can be listed.

    Raises:
        InputError: no images, or with labels images that lie in no class folder.
    """
    temporary = home / PLAN_IN_WORK
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pieces").mkdir(parents=True)
    try:
        _add_listing(Plan(temporary, source, target, settings, (), (), ""))
        clear()
        shutil.rmtree(home / PLAN, ignore_errors=True)
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
        self._places, self._source = plan.places, plan.source
        self._sizes = np.fromfile(plan.folder / "sizes.bin", np.int64, plan.num_rows)
        hashes = self._hashes(plan.places, plan.num_rows)
        self._rows = np.argsort(hashes)
        self._hashes_of_places = hashes[self._rows]
        self._hashes_of_keys = np.sort(self._hashes(plan.keys, plan.num_rows))
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
    def _hashes(texts: Texts, rows: int) -> np.ndarray:
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
