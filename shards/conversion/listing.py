"""Lists a source into a plan (see conversion_plan.py), or appends what has come since.

Memory: next to none, whatever the number of files; 40 bytes a listed file while a plan is updated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shards.conversion.conversion_plan import (
    HOLDOUT,
    PLAN,
    PLAN_IN_WORK,
    TRAIN,
    Part,
    Plan,
    open_plan,
    printable,
    write_plan,
)
from shards.conversion.shuffle import append, append_shuffled
from shards.format.labels import class_names
from shards.ground.errors import InputError
from shards.ground.files import atomic_write, naming, sync_file
from shards.sources.clip_source import IMAGE_ALONE
from shards.sources.found import HIDDEN, NAMED, Found, left_out
from shards.sources.source import Source

_LABELS_AT_ONCE = 2**18
_NAMED_AT_MOST = 5


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
        InputError: no images, or with labels none that has one, or images that lie in no class folder.
    """
    temporary = home / PLAN_IN_WORK
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pieces").mkdir(parents=True)
    try:
        with naming(temporary):
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
        InputError: a listed file changed, or this is another source.
    """
    _check_source(plan)
    with naming(plan.folder):
        gone = _add_listing(plan)
    return open_plan(plan.folder.parent, plan.source), gone


def check_listing(plan: Plan) -> None:
    """Check that the source still has what the plan lists.

    Raises:
        InputError: files that came, went or changed their size since.
    """
    digest = xxhash.xxh3_128()
    count = sum(_add(digest, found) for found in _listed(plan.source, plan.settings))
    if digest.hexdigest() != plan.fingerprint:
        raise InputError(
            f"{plan.source.location}: has changed since {plan.folder} was made ({plan.num_rows:,} images then, "
            f"{count:,} now, or other names or sizes); restore it, add what is new with --update, or start over with "
            f"--force"
        )


def _check_source(plan: Plan) -> None:
    was = json.loads((plan.folder / "plan.json").read_text(encoding="utf-8"))["source"]
    if was != plan.source.location:
        raise InputError(
            f"{plan.folder}: was made from {was}, and --update adds what is new there; it cannot add "
            f"{plan.source.location}: convert that into a separate folder"
        )


def _add_listing(plan: Plan) -> int:
    """List the source and append what the plan does not have; returns how many files of the plan are gone."""
    source, folder, first = plan.source, plan.folder, plan.num_rows
    _cut(folder, first)
    known = _Known(plan) if first else None
    digest = xxhash.xxh3_128()
    numbers: dict[str, int] = {"": -1}
    counts = {TRAIN: 0, HOLDOUT: 0}
    reasons: Counter[str] = Counter()
    named: list[str] = []
    with (
        _TextFile(folder, "places") as places,
        _TextFile(folder, "keys") as keys,
        (folder / "classes.new").open("wb") as labels,
        (folder / "sizes.bin").open("ab") as sizes,
        (folder / f"{TRAIN}.new").open("wb") as train,
        (folder / f"{HOLDOUT}.new").open("wb") as holdout,
        atomic_write(folder / "others.jsonl") as others,
    ):
        for found in _listed(source, plan.settings):
            if not _add(digest, found):
                others.write((json.dumps(_left_out(source, found)) + "\n").encode())
                reasons[found.reason] += 1
                if found.reason in NAMED and len(named) < _NAMED_AT_MOST:
                    named.append(printable(source.name(found.place)))
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
        why = ", ".join(f"{count:,} x {reason}" for reason, count in reasons.most_common(3))
        remedy = next((NAMED[reason] for reason in reasons if reason in NAMED), "pass the folder that holds them")
        such = f"; {', '.join(named)}" if named else ""
        wanted = "images"
        if plan.settings.get("clips"):
            wanted = "videos, and no images with a sound each,"
            remedy += ", or leave out --clips to convert images" if reasons[IMAGE_ALONE] else ""
        raise InputError(
            f"{source.location}: no {wanted} below this folder ({reasons.total()} other files"
            f"{f': {why}' if why else ''}{such}); {remedy}"
        )
    classes = class_names(numbers, plan.classes, numbers=plan.settings["labels"] == "cls")
    if plan.settings["labels"] != "none" and not classes:
        raise InputError(
            f"{source.location}: none of its images has a class; --labels {plan.settings['labels']} does "
            f"not fit; see `shards convert --help`"
        )
    _append_labels(folder, numbers, classes)
    _append_order(plan)
    if added:
        (folder / "duplicates.bin").unlink(missing_ok=True)  # new ones may repeat old ones, or each other
    parts = [*plan.parts, *(Part(split, rows) for split, rows in counts.items() if rows)]
    content = {
        "source": source.location,
        "kind": source.kind,
        "target": plan.target,
        "settings": plan.settings,
        "classes": classes,
        "parts": [vars(part) for part in parts],
        "fingerprint": digest.hexdigest(),
    }
    for table in folder.glob("*.bin"):
        sync_file(table)  # or plan.json, which speaks of them, might outlive a power cut that they do not
    write_plan(folder, content)
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
    """Truncate the files of a plan to `rows` rows: what lies beyond was left by an update that was killed."""
    if not rows:
        return
    for name, width in (("labels", 4), ("sizes", 8), ("order", 8), ("place_ends", 8), ("key_ends", 8)):
        if (folder / f"{name}.bin").exists():
            os.truncate(folder / f"{name}.bin", rows * width)
    for name in ("place", "key"):
        end = np.fromfile(folder / f"{name}_ends.bin", np.uint64, 1, offset=8 * (rows - 1))
        os.truncate(folder / f"{name}s.bin", int(end[0]))


def _listed(source: Source, settings: dict[str, Any]) -> Iterator[Found]:
    """The files of a source; where its folders are the classes, without those in hidden ones."""
    for found in source.list():
        is_hidden = settings["labels"] == "folder" and found.key and found.folder.startswith(".")
        yield left_out(found.place, HIDDEN) if is_hidden else found


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
    if not found.folder:
        raise InputError(
            f"{source.location}: {printable(source.name(found.place))} is not in a class folder below it, which "
            f"--labels folder needs; move it into one, or convert without labels (a list: with --labels column:NAME)"
        )
    # Not `printable`: two folders whose names differ only in undecodable bytes would become one class.
    return os.fsencode(found.folder).decode("utf-8", "backslashreplace")


def _left_out(source: Source, found: Found) -> dict[str, str]:
    return {"source": printable(source.name(found.place)), "reason": found.reason}


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
    """What a plan lists already: found by hashes of what identifies files, and of keys."""

    def __init__(self, plan: Plan) -> None:
        self._places, self._source = plan.places, plan.source
        self._sizes = np.fromfile(plan.folder / "sizes.bin", np.int64, plan.num_rows)
        hashes = _hashes(map(self._identity, range(plan.num_rows)), plan.num_rows)
        self._rows = np.argsort(hashes)
        self._hashes_of_files = hashes[self._rows]
        self._hashes_of_keys = np.sort(_hashes(map(plan.keys.raw, range(plan.num_rows)), plan.num_rows))
        self._suffix = f"~u{len(plan.parts)}"
        self._seen = np.zeros(plan.num_rows, bool)

    def has(self, found: Found) -> bool:
        """Whether a file is listed; one that is gone, though a list still names it, is. InputError: it changed."""
        rows = self._rows_of(os.fsencode(self._source.identity(found.place)))
        same = [row for row in rows if self._places.raw(row) == os.fsencode(found.place)]
        if equal := [row for row in same if self._sizes[row] == found.size]:
            self._seen[equal] = True
            return True
        if same and found.size == -1:
            return True
        changed = [row for row in same or rows if not same or self._sizes[row] != -1]  # -1: it was not there
        if changed:
            name = printable(self._source.name(found.place))
            how = (
                f"was {self._sizes[changed[0]]:,} bytes and is {found.size:,} now"
                if same
                else "is not as it was listed (other columns in the list, another place in the tar)"
            )
            raise InputError(
                f"{self._source.location}: {name} {how}; --update only adds files; for changed ones start "
                f"over with --force"
            )
        return False

    def free(self, key: str) -> str:
        """A key that no listed file has. Keys of a listing never contain what is added here."""
        at = np.uint64(xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogateescape")))
        place = np.searchsorted(self._hashes_of_keys, at)
        taken = place < len(self._hashes_of_keys) and self._hashes_of_keys[place] == at
        return key + self._suffix if taken else key

    def num_gone(self) -> int:
        """How many of the listed files were not asked for."""
        return int(np.count_nonzero(~self._seen))

    def _identity(self, row: int) -> bytes:
        return os.fsencode(self._source.identity(self._places[row]))

    def _rows_of(self, identity: bytes) -> list[int]:
        at = np.uint64(xxhash.xxh3_64_intdigest(identity))
        first, last = (int(np.searchsorted(self._hashes_of_files, at, side)) for side in ("left", "right"))
        return [row for row in map(int, self._rows[first:last]) if self._identity(row) == identity]


def _hashes(texts: Iterable[bytes], count: int) -> np.ndarray:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, count)


class _TextFile:
    """Appends texts one after the other to `places.bin` (or `keys.bin`), and where each ends to `place_ends.bin`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._texts = (folder / f"{name}.bin").open("ab")
        self._ends = (folder / f"{name[:-1]}_ends.bin").open("ab")
        self._place = self._texts.tell()

    def add(self, text: bytes) -> None:
        """Append one text."""
        self._texts.write(text)
        self._place += len(text)
        self._ends.write(self._place.to_bytes(8, "little"))

    def __enter__(self) -> _TextFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._texts.close()
        self._ends.close()
