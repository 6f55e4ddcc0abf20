"""The pieces of a conversion: each becomes one shard, in any process and in any order, to the same bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.cleaning.duplicates import Fingerprints, image_hashes
from shards.cleaning.rules import Cleaning
from shards.conversion.clip_pieces import add_clips, clip_settings_in, file_hashes
from shards.conversion.conversion_plan import TRAIN, Plan, Row, Written, printable
from shards.conversion.targets import Target
from shards.format.clip_writer import ClipWriter
from shards.format.manifest import ShardEntry
from shards.format.shard_index import index_path, write_index
from shards.format.tar import file_checksum
from shards.format.writer import ShardWriter
from shards.ground.files import atomic_write
from shards.ground.worker_processes import over
from shards.images.reading import ImageError
from shards.sources.clip_source import ClipSource
from shards.sources.source import Content, Source
from shards.stores.locate import process_context

_SOME = 8
"""Files of a plan, and of a piece, by which a file that a store refuses is told from a store that refuses all."""


def scan_pieces(plan: Plan, pieces: range, workers: int) -> None:
    """Hash the images of those of these pieces that are not scanned yet, to find duplicates among them."""
    todo = [piece for piece in pieces if not plan.scan_file(piece).exists()]
    look = plan.settings["duplicates"] == "near"
    cleaning = Cleaning(**{key: plan.settings[key] for key in vars(Cleaning())})
    _over_pieces(partial(_scan_piece, plan, cleaning, look), plan, pieces, todo, workers, "scan")


def _scan_piece(plan: Plan, cleaning: Cleaning, look: bool, piece: int) -> int:
    """Hash the images of a piece; returns how many files it had."""
    rows, found = plan.rows(piece), []
    plan.source.compare_with(_some_places(plan, rows))
    for row, numbers in _hashes(plan.source, rows, cleaning, look):
        if numbers is not None:
            found.append((row.number, *numbers))
    columns = np.array(found, np.uint64).reshape(-1, 4).T
    Fingerprints(*(np.ascontiguousarray(column) for column in columns)).save(plan.scan_file(piece))
    return len(rows)


def _hashes(
    source: Source, rows: list[Row], cleaning: Cleaning, look: bool
) -> Iterator[tuple[Row, tuple[int, int, int] | None]]:
    if isinstance(source, ClipSource):
        yield from ((row, file_hashes(source, row.place)) for row in rows)
        return
    for row, content in _contents(source, rows):
        if not isinstance(content, OSError):  # reported when its piece is written
            yield row, image_hashes(content.payload, cleaning, look=look)


def write_pieces(plan: Plan, target: Target, pieces: range, cleaning: Cleaning, workers: int) -> None:
    """Write those of these pieces that are not written yet."""
    todo = [piece for piece in pieces if not _is_written(plan, target, piece)]
    _over_pieces(partial(_write_piece, plan, target, cleaning), plan, pieces, todo, workers, "convert")


def _over_pieces(do: Callable[[int], int], plan: Plan, pieces: range, todo: list[int], workers: int, what: str) -> None:
    """Do something for the pieces that are left, in several processes, with a bar that counts files."""
    total, left = (sum(plan.num_rows_of(piece) for piece in part) for part in (pieces, todo))
    places = (plan.source.location, plan.target)
    if any(place.startswith("memory:") for place in places):
        workers = 1  # other processes have another memory
    clips = bool(plan.settings.get("clips"))
    unit = "file" if clips else "image"
    with tqdm(total=total, initial=total - left, unit=unit, desc=what, leave=False, mininterval=0.5) as bar:
        for count in over(do, todo, workers, process_context(*places, clips=clips)):
            bar.update(count)


def _is_written(plan: Plan, target: Target, piece: int) -> bool:
    written = plan.written(piece)
    if written is None or written.entry is None:
        return written is not None
    return target.has(plan.split(piece), written.entry)


def _write_piece(plan: Plan, target: Target, cleaning: Cleaning, piece: int) -> int:
    """Write the shard of a piece and record it in the plan; returns how many files it had."""
    rows, split = plan.rows(piece), plan.split(piece)
    tar = target.folder(split) / f"{shard_name(plan, split)}-{piece:06d}.tar"
    for leftover in tar.parent.glob(f".{tar.stem}.*.writing"):
        leftover.unlink(missing_ok=True)
    written = write_shard(plan, tar, rows, cleaning)
    if written.entry is not None:
        target.publish(split, [index_path(tar), tar])
    plan.record(piece, written)
    return len(rows)


def _some_places(plan: Plan, rows: list[Row]) -> list[str]:
    """A few files from all over a plan, and of these rows."""
    step, step_of_rows = plan.num_rows // _SOME + 1, len(rows) // _SOME + 1
    numbers = [*range(0, plan.num_rows, step), *(row.number for row in rows[::step_of_rows])]
    return [plan.places[number] for number in dict.fromkeys(numbers)]


def _contents(source: Source, rows: list[Row]) -> Iterator[tuple[Row, Content | OSError]]:
    """The files of some rows, in order; from a store many at a time."""

    def read(row: Row) -> Content | OSError:
        try:
            return source.read(row.place)
        except OSError as error:
            return error

    at_a_time = source.reads(rows[0].place) if rows else 1
    if at_a_time == 1:
        yield from ((row, read(row)) for row in rows)
        return
    with ThreadPoolExecutor(at_a_time) as threads:
        try:
            ahead: deque[tuple[Row, Any]] = deque()
            for row in rows:
                ahead.append((row, threads.submit(read, row)))
                if len(ahead) > 2 * at_a_time:
                    first, content = ahead.popleft()
                    yield first, content.result()
            yield from ((row, content.result()) for row, content in ahead)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def write_shard(plan: Plan, tar_path: Path, rows: list[Row], cleaning: Cleaning) -> Written:
    """Write the tar of some rows and its index; a shard without a usable image is not written."""
    source, repeated = plan.source, plan.repeated(rows)
    source.compare_with(_some_places(plan, rows))
    skipped: list[dict[str, str]] = []
    for row in rows:
        if row.number in repeated:
            other, reason = repeated[row.number]
            skipped.append({"source": printable(source.name(row.place)), "reason": reason, "repeats": other})
    rows = [row for row in rows if row.number not in repeated]
    clips = clip_settings_in(plan.settings)
    with atomic_write(tar_path) as file:
        if clips is not None and isinstance(source, ClipSource):
            clip_writer = ClipWriter(file)
            skipped += add_clips(clip_writer, source, rows, clips, cleaning)
            writer: ShardWriter = clip_writer
        else:
            writer = ShardWriter(file)
            skipped += _add_images(writer, source, rows, cleaning)
        index, checksum = writer.finish()
        # The index comes first: a tar with an index is known as one of ours, wherever a conversion is killed.
        write_index(index, index_path(tar_path))
    if not len(writer):
        for path in (tar_path, index_path(tar_path)):
            path.unlink()
        return Written(None, skipped)
    entry = ShardEntry(tar_path.name, len(writer), writer.num_bytes, checksum, file_checksum(index_path(tar_path)))
    return Written(entry, skipped)


def _add_images(writer: ShardWriter, source: Source, rows: list[Row], cleaning: Cleaning) -> list[dict[str, str]]:
    """Clean and write the images of these rows; returns what was left out, and why."""
    skipped: list[dict[str, str]] = []
    for row, content in _contents(source, rows):
        try:
            if isinstance(content, OSError):
                raise ImageError(f"cannot be read: {content.strerror or content}")
            payload, suffix, facts = cleaning.apply(content.payload, content.suffix)
        except ImageError as error:
            skipped.append({"source": printable(source.name(row.place)), "reason": str(error)})
            continue
        writer.add(row.key, {**content.others, suffix: payload}, suffix, facts, row.label)
    return skipped


def shard_name(plan: Plan, split: str) -> str:
    """The first part of the names of a split's shards."""
    return plan.settings["name"] if split == TRAIN else f"{plan.settings['name']}-{split}"
