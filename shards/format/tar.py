"""Samples of a tar, by WebDataset's rule: consecutive members that share everything before the first dot of the base
name are one sample. Beyond that rule, members that lie apart (all images first, then all labels) find each other.

Nothing is ever extracted: member names are keys, never paths.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from shards.format.shard_index import ShardIndex
from shards.ground.errors import InputError
from shards.ground.files import naming
from shards.ground.open_file import OpenFile
from shards.images.formats import HEAD_BYTES
from shards.images.names import IMAGE_SUFFIXES, STORED_SUFFIXES, why_no_image
from shards.images.reading import ImageError, inspect

_BLOCK = 512
_ZEROS_AT_ONCE = 2**20

ONE_MORE = "one more image of a sample"
"""Why images of a sample are left out, all but one."""

HELD_SAMPLES = 2**16
"""Samples of a tar that wait for members which lie apart from them; some hundred bytes each."""


class TornTar(InputError):
    """A tar that ends too early, or is damaged."""


class ScatteredTar(InputError):
    """A tar in which members of a sample lie more than HELD_SAMPLES samples apart."""


@dataclass
class TarSample:
    """One sample: its key, (offset, size) in the tar of each member by its suffix, and, where none of these names an
    image, the suffixes of members that are images by their content.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    unnamed: list[str] = field(default_factory=list)

    def image(self) -> tuple[int, int] | None:
        """Place of the image, if it has one: of several the first."""
        return self.members[self.images()[0]] if self.images() else None

    def images(self) -> list[str]:
        """Suffixes of the members that are images; those that are nothing but a format come first."""
        found = [suffix for suffix in self.members if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
        return sorted(found or self.unnamed, key=lambda suffix: ("." in suffix, suffix not in STORED_SUFFIXES))

    def completes(self, other: TarSample) -> bool:
        """Whether another group of members of the same key is the rest of this sample, and not one more sample."""
        return self.members.keys().isdisjoint(other.members) and not (self.images() and other.images())


class IndexRow(NamedTuple):
    """What an index says of a sample: see `ShardIndex`."""

    key: str
    offset: int
    size: int
    width: int
    height: int
    format: int
    checksum: int


@dataclass
class TarContents:
    """The index of a tar (labels not resolved yet), and the samples that could not be indexed, with reasons."""

    index: ShardIndex
    label_texts: list[str]
    skipped: list[tuple[str, str]]


def split_name(name: str) -> tuple[str, str]:
    """`a/b.seg.png` to (`a/b`, `seg.png`), as WebDataset does."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def walk(file: BinaryIO, where: object, skipped: list[tuple[str, str]] | None = None) -> Iterator[TarSample]:
    """The samples of a tar, in the order of their first members. Hard links are what they lead to.

    Args:
        file: the tar; others may seek in it meanwhile.
        where: names it to the user.
        skipped: gets the names of members that have no bytes of their own in the tar, with reasons.

    Raises:
        TornTar: not a tar, damaged, or cut anywhere (a whole one ends in two blocks of zeros); the samples before that
            are given first.
        ScatteredTar: members of a sample lie too far apart; samples before that, of more than HELD_SAMPLES, were given.
    """
    waiting = _Waiting(where)
    try:
        for group in _groups(file, where, [] if skipped is None else skipped):
            yield from (_looked_into(sample, file) for sample in waiting.add(group))
    except TornTar:
        yield from (_looked_into(sample, file) for sample in waiting.rest())
        raise
    yield from (_looked_into(sample, file) for sample in waiting.rest())


class _Waiting:
    """Samples that wait for members which lie apart from them."""

    def __init__(self, where: object) -> None:
        self._where = where
        self._samples: dict[int, TarSample] = {}
        self._newest: dict[str, int] = {}
        self._left: dict[int, bool] = {}
        self._count = 0

    def add(self, group: TarSample) -> Iterator[TarSample]:
        """Take consecutive members of one key; gives the sample that has waited longest, if too many do."""
        number = self._newest.get(group.key)
        if number is not None and self._samples[number].completes(group):
            self._samples[number].members.update(group.members)
            return
        had_image = self._left.get(hash(group.key))
        if number is None and had_image is not None and had_image != bool(group.images()):
            raise ScatteredTar(
                f"{self._where}: members of the sample {as_text(group.key)} lie more than {HELD_SAMPLES:,} samples "
                f"apart; pack the tar again in the order of the names (tar --sort=name)"
            )
        self._samples[self._count] = group
        self._newest[group.key] = self._count
        self._count += 1
        if len(self._samples) > HELD_SAMPLES:
            yield self._release()

    def rest(self) -> Iterator[TarSample]:
        """The samples that still wait."""
        while self._samples:
            yield self._release()

    def _release(self) -> TarSample:
        number = next(iter(self._samples))
        sample = self._samples.pop(number)
        if self._newest[sample.key] == number:
            del self._newest[sample.key]
        self._left[hash(sample.key)] = bool(sample.images())
        return sample


def _groups(file: BinaryIO, where: object, skipped: list[tuple[str, str]]) -> Iterator[TarSample]:
    """Consecutive members of one key."""
    sample: TarSample | None = None
    spans: dict[str, tuple[int, int]] = {}
    size = file.seek(0, os.SEEK_END)
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                reason = _add_span(member, spans)
                if reason:
                    skipped.append((member.name, reason))
                if reason or member.isdir():
                    continue
                key, suffix = split_name(member.name)
                if sample is None or sample.key != key or suffix in sample.members:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key)
                sample.members[suffix] = spans[posixpath.normpath(member.name)]
            end = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        # The last group may lack members, or bytes.
        raise TornTar(f"{where}: not a whole tar ({error}); restore it or convert again") from error
    _check_end(file, where, size, end)
    if sample is not None:
        yield sample


def _looked_into(sample: TarSample, file: BinaryIO) -> TarSample:
    """A sample whose suffixes name no image, with those of its members that are images by their content."""

    def begin(start: int, size: int, _: int) -> bytes:
        file.seek(start)
        return file.read(min(size, HEAD_BYTES))

    if not sample.images():
        sample.unnamed = [
            suffix for suffix, span in sample.members.items() if not why_no_image(f".{suffix}", partial(begin, *span))
        ]
    return sample


def _add_span(member: tarfile.TarInfo, spans: dict[str, tuple[int, int]]) -> str:
    """Note where in the tar the bytes of a member are, by its name; returns why they are nowhere."""
    name = posixpath.normpath(member.name)
    target = spans.get(posixpath.normpath(member.linkname)) if member.islnk() else None
    spans.pop(name, None)  # of an earlier member of that name
    if member.isdir():
        return ""
    if member.issparse():
        return "a sparse member of a tar"
    if member.issym():
        return "a symbolic link in a tar"
    if member.islnk():
        if target is None:
            return "a hard link in a tar that leads to no file before it"
        spans[name] = target
        return ""
    if not member.isfile():
        return "not a regular file"
    spans[name] = (member.offset_data, member.size)
    return ""


def _check_end(file: BinaryIO, where: object, size: int, end: int) -> None:
    # tarfile takes a cut between two members, or a damaged header, for the end of the archive.
    start = max(0, end - _BLOCK)
    file.seek(start)
    head = file.read(2 * _BLOCK)
    is_whole = size >= start + 2 * _BLOCK and not any(head[min(_BLOCK, size - start - 2 * _BLOCK) :])
    while is_whole and (tail := file.read(_ZEROS_AT_ONCE)):  # of a tar damaged near its start this may be most of it
        is_whole = not any(tail)
    if not is_whole:
        raise TornTar(
            f"{where}: torn or damaged near byte {end}: a whole tar ends in zeros there; restore it or convert again"
        )


def index_tar(path: Path, *, decode: bool = False) -> TarContents:
    """Build the index of a tar.

    Args:
        path: the tar.
        decode: also decode every image and leave out those that fail.

    Raises:
        InputError: the tar is damaged or cut, or not sorted.
    """
    rows: list[IndexRow] = []
    labels: list[str] = []
    skipped: list[tuple[str, str]] = []
    with naming(path), path.open("rb") as file:
        tar = OpenFile(path)
        if tar.size == 0:
            raise InputError(f"{path}: empty file; restore it or convert again")
        for sample in walk(file, path, skipped):
            place = sample.image()
            key = as_text(sample.key)
            if place is None:
                skipped.append((key, "no image"))
                continue
            skipped += [(f"{key}.{suffix}", ONE_MORE) for suffix in sample.images()[1:]]
            payload = tar.read(*place)
            try:
                facts = inspect(payload, decode=decode)
            except ImageError as error:
                skipped.append((key, str(error)))
                continue
            rows.append(
                IndexRow(key, *place, facts.width, facts.height, facts.format, xxhash.xxh3_64_intdigest(payload))
            )
            start, size = sample.members.get("cls", (0, 0))
            labels.append(tar.read(start, size).decode("utf-8", "replace").strip())
    return TarContents(index_of_rows(rows), labels, [(as_text(name), reason) for name, reason in skipped])


def as_text(name: str) -> str:
    """A member's name as text: bytes that are no UTF-8 are spelled out, so that different names stay different."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def index_of_rows(rows: list[IndexRow]) -> ShardIndex:
    """The index of these samples, without labels."""
    keys, offset, size, width, height, image_format, checksum = zip(*rows, strict=True) if rows else ((),) * 7
    return ShardIndex(
        keys,
        np.array(offset, np.uint64),
        np.array(size, np.uint64),
        np.array(width, np.uint32),
        np.array(height, np.uint32),
        np.array(image_format, np.uint8),
        np.array(checksum, np.uint64),
        np.full(len(rows), -1, np.int32),
    )


def file_checksum(path: Path) -> str:
    """`xxh3-128:<hex>` of a whole file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return f"xxh3-128:{digest.hexdigest()}"
