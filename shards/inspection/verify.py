"""`shards verify`: is every byte still what was converted, and does every image decode?"""

from __future__ import annotations

import errno
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash
from tqdm import tqdm

from shards.clips.library import pyav
from shards.format.manifest import Manifest, ShardEntry
from shards.format.shard_index import ShardIndex, index_path, read_index
from shards.format.tar import TarSample, as_text, file_checksum, walk
from shards.ground.errors import InputError, NotEnoughMemory
from shards.ground.open_file import OpenFile
from shards.ground.worker_processes import over
from shards.images.reading import ImageError, inspect
from shards.inspection.verify_clips import clip_problems, leads_to_all
from shards.stores.locate import fetched, manifest_at, names_at, process_context

_NOT_THE_SHARD = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of reading that say nothing about what is read."""


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the manifest says."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key + ': ' if self.key else ''}{self.what}"


def verify(location: str | Path, *, workers: int, decode: bool) -> tuple[Manifest, list[Problem]]:
    """Compare a shard folder with its manifest: sizes, checksums, counts, index, and with `decode` every image.

    Raises:
        InputError: no readable manifest; or clips are to be decoded, and PyAV is not installed.
    """
    location = str(location)
    manifest = manifest_at(location)
    check = partial(_verify_shard, location, manifest.classes, decode)
    clips = bool(manifest.settings.get("clips"))
    if clips and decode:
        pyav()  # without it every sound would count as damaged
    context = process_context(location, clips=clips)
    found = list(
        tqdm(
            over(check, manifest.shards, workers, context),
            total=len(manifest.shards),
            unit="shard",
            desc="verify",
            leave=False,
        )
    )
    listed = {shard.name for shard in manifest.shards}
    strangers = [
        Problem(name, "", "not in the manifest")
        for name in names_at(location)
        if name.endswith(".tar") and name not in listed
    ]
    return manifest, [problem for problems in found for problem in problems] + strangers


def _verify_shard(location: str, classes: tuple[str, ...], decode: bool, shard: ShardEntry) -> list[Problem]:
    with fetched(location, [shard.name, index_path(Path(shard.name)).name]) as folder:
        found = []
        try:
            for key, what in _problems(folder / shard.name, shard, classes, decode):
                found.append(Problem(shard.name, key, what))
        except OSError as error:
            if error.errno in _NOT_THE_SHARD:
                raise
            found.append(Problem(shard.name, "", f"cannot be read ({error.strerror or error})"))
        return found


def _problems(tar: Path, shard: ShardEntry, classes: tuple[str, ...], decode: bool) -> Iterator[tuple[str, str]]:
    if not tar.is_file():
        yield "", "missing"
        return
    size, is_whole = tar.stat().st_size, False
    if size != shard.num_bytes:
        yield "", f"{size:,} bytes, the manifest says {shard.num_bytes:,}"
    elif file_checksum(tar) != shard.checksum:
        yield "", "checksum of the file differs from the manifest"
    else:
        is_whole = True
    try:
        index = read_index(index_path(tar))
    except InputError as error:
        yield "", str(error).rpartition("; run ")[0].replace(f"{tar.parent}/", "")  # of a store it is a passing folder
        return
    if shard.index_checksum and file_checksum(index_path(tar)) != shard.index_checksum:
        yield "", "checksum of its index differs from the manifest"
    if len(index) != shard.num_samples:
        yield "", f"its index lists {len(index)} samples, the manifest says {shard.num_samples}"
    try:
        stored = OpenFile(tar)
        if stored.size == 0:
            raise InputError(f"{tar}: empty file; restore it or convert again")
        with tar.open("rb") as file:
            yield from _of_images(stored, index, decode)
            if index.clips is not None:
                yield from clip_problems(stored, index, index.clips, decode)
            if not is_whole:
                yield from _of_headers(stored, index)
            # By place as well: a tar that was joined or appended to may hold a name several times.
            found = {(as_text(sample.key), sample.image()): sample for sample in walk(file, tar)}
            for row in range(len(index)):
                sample = found.get((index.key(row), _first_image(index, row)))
                if sample is None or (index.clips is not None and not leads_to_all(sample, index.clips, row)):
                    yield index.key(row), "the tar's headers do not lead to it"
                elif not is_whole and not _is_label(stored, sample, index.label.item(row), classes):
                    yield index.key(row), "its cls is not the label of the index"
    except NotEnoughMemory as error:  # not the shard's fault
        raise NotEnoughMemory(f"{shard.name}: {error}") from error
    except InputError as error:
        yield "", str(error).removeprefix(f"{tar}: ")


def _first_image(index: ShardIndex, row: int) -> tuple[int, int]:
    """Place of the image that readers of WebDataset take a sample for: of a clip the first frame."""
    if index.clips is None:
        return index.offset.item(row), index.size.item(row)
    frame = index.clips.frames(row)[0]
    return index.clips.offset.item(frame), index.clips.size.item(frame)


def _of_images(stored: OpenFile, index: ShardIndex, decode: bool) -> Iterator[tuple[str, str]]:
    for row in range(len(index)):
        payload = stored.read(index.offset.item(row), index.size.item(row))
        if xxhash.xxh3_64_intdigest(payload) != index.checksum.item(row):
            yield index.key(row), "bytes of the image differ from the index"
        elif decode:
            yield from _undecodable(index.key(row), payload, (index.width.item(row), index.height.item(row)))


def _of_headers(stored: OpenFile, index: ShardIndex) -> Iterator[tuple[str, str]]:
    """Samples whose image has a damaged header, which ends the tar for those who read it from front to back."""
    for row in range(len(index)):
        start = index.offset.item(row)
        try:
            size = tarfile.TarInfo.frombuf(stored.read(max(0, start - 512), 512), "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            yield index.key(row), "its header in the tar is damaged"
            continue
        if size != index.size.item(row):
            yield index.key(row), f"its header in the tar says {size:,} bytes, the index {index.size.item(row):,}"


def _is_label(stored: OpenFile, sample: TarSample, label: int, classes: tuple[str, ...]) -> bool:
    if label < 0 or "cls" not in sample.members:
        return True
    start, size = sample.members["cls"]
    text = stored.read(start, size).decode("utf-8", "replace").strip()
    return text == str(label) or (label < len(classes) and text == classes[label])


def _undecodable(key: str, payload: bytes, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    try:
        found = inspect(payload, decode=True, max_pixels=size[0] * size[1])
    except ImageError as error:
        yield key, str(error)
        return
    if sorted((found.width, found.height)) != sorted(size):
        yield key, f"is {found.width} x {found.height} pixels, the index says {size[0]} x {size[1]}"
