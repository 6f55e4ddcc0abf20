"""Where images come from: a folder, a zip archive, tars, a list of paths, on a disk or in a store. Each lists its files
in a fixed order and reads any of them by what it listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from shards.format.keys import FreshKeys
from shards.ground.errors import InputError
from shards.images.names import NO_IMAGE, is_image, suffix_of, why_no_image
from shards.sources.archives import MAX_MEMBER_BYTES, TarSource, ZipSource, is_tar, tars_beside
from shards.sources.found import Content, Found, first_folder, left_out, why_beside
from shards.sources.tables import READERS, ListSource
from shards.stores.folders import Denied, Entry, Folder, open_folder
from shards.stores.store import is_url

IN_FOLDERS = ("folder", "tars")
"""Kinds of sources that are folders; the others are files."""

_KINDS = {"zip": "zip", "tar": "tar", **dict.fromkeys(READERS, "list")}
"""Kinds of sources that are files, by suffix."""


class Source(Protocol):
    """What can be converted.

    Attributes:
        location: path or URL.
        kind: what is there, as `open_as` takes it.
    """

    location: str
    kind: str

    def list(self) -> Iterator[Found]:
        """All files, in an order that is always the same. InputError: the source cannot be listed."""
        ...

    def read(self, place: str) -> Content:
        """One file. OSError: it cannot be read; its text names no values, since such reasons are counted."""
        ...

    def name(self, place: str) -> str:
        """The name of a file, for people."""
        ...

    def identity(self, place: str) -> str:
        """What stays the same when the source is rewritten: equal for the same file, or for what replaced it."""
        ...

    def reads(self, place: str) -> int:
        """How many files are best read at a time, where this one is."""
        ...

    def compare_with(self, places: Sequence[str]) -> None:
        """See `Folder`."""
        ...


def open_source(location: str | Path, *, label_column: str = "") -> Source:
    """The source at a path or URL, by what is there: a folder of tars counts as tars.

    Raises:
        InputError: nothing is there, or nothing that can be converted.
    """
    location = str(location)
    if is_url(location) or os.path.isfile(location):
        kind = _KINDS.get(suffix_of(os.path.split(location.rstrip("/"))[1]))
        if kind:
            return open_as(kind, location, label_column=label_column)
    if not is_url(location) and not os.path.isdir(location):
        exists = os.path.exists(location)
        what = "neither a folder nor a file that can be converted" if exists else "no such folder or file"
        raise InputError(
            f"{location}: {what}; pass a folder of images or of tars, a .zip, or a list "
            f"({', '.join(f'.{name}' for name in READERS)}); tars must be unpacked ones (.tar)"
        )
    folder = open_folder(location)
    if not any(is_tar(entry) for entry in folder.entries()):
        return FolderSource(folder)
    tars_beside(folder)
    return TarSource(folder)


def open_as(kind: str, location: str, *, label_column: str = "") -> Source:
    """The source at a path or URL where the kind of it is known: nothing is looked at, and so it may be away.

    Args:
        kind: "folder", "tars" (a folder of them), "tar", "zip" or "list".
        location: path or URL.
        label_column: see `open_source`.
    """
    if kind in IN_FOLDERS:
        folder = open_folder(location)
        return TarSource(folder) if kind == "tars" else FolderSource(folder)
    parent, name = os.path.split(location.rstrip("/"))
    folder = open_folder(parent)
    if kind == "list":
        return ListSource(folder, name, label_column)
    return TarSource(folder, name) if kind == "tar" else ZipSource(folder, name)


class FolderSource:
    """Files below a folder, depth first, each folder's in the order of their names; memory of one branch of folders.

    A place is a path below it.
    """

    kind = "folder"

    def __init__(self, folder: Folder) -> None:
        self.location, self._folder = folder.location, folder

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        yield from self._walk()

    def read(self, place: str) -> Content:
        """See `Source`."""
        return Content(self._folder.read(place), suffix_of(place))

    def name(self, place: str) -> str:
        """See `Source`."""
        return place

    def identity(self, place: str) -> str:
        """See `Source`."""
        return place

    def reads(self, place: str) -> int:
        """See `Source`."""
        return self._folder.reads

    def compare_with(self, places: Sequence[str]) -> None:
        """See `Source`."""
        self._folder.compare_with([self.name(place) for place in places])

    def _walk(self) -> Iterator[Found]:
        branch = [Level("", "", self._folder.entries())]  # no recursion: folders may lie deeper than Python's stack
        while branch:
            level = branch[-1]
            entry = next(level.left, None)
            if entry is None:
                branch.pop()
                continue
            place = level.folder + entry.name
            if entry.is_folder:
                try:
                    entries = self._folder.entries(f"{place}/")
                except Denied:
                    yield left_out(f"{place}/", "folder cannot be listed")
                    continue
                branch.append(Level(f"{place}/", f"{level.key_folder}{level.folders.of_folder(entry.name)}/", entries))
            else:
                yield self._file(level, entry)

    def _file(self, level: Level, entry: Entry) -> Found:
        place = level.folder + entry.name
        if reason := entry.other or why_beside(place) or self._why_no_image(place, entry):
            return left_out(place, reason)
        return Found(place, level.key_folder + level.files.of_file(entry.name), entry.size, folder=first_folder(place))

    def _why_no_image(self, place: str, entry: Entry) -> str:
        if self._folder.reads > 1:
            return why_no_image(entry.name) or (NO_IMAGE if self._is_unnamed_and_large(entry) else "")
        return why_no_image(entry.name, lambda size: self._folder.read_spans(place, [(0, size)])[0])

    @staticmethod
    def _is_unnamed_and_large(entry: Entry) -> bool:
        return not is_image(entry.name) and entry.size > MAX_MEMBER_BYTES


class Level:
    """A folder on the way down.

    Attributes:
        folder: its place, ending in a slash.
        key_folder: what the keys below it begin with.
        left: its entries that were not visited yet.
        files, folders: keys of its files and folders.
    """

    def __init__(self, folder: str, key_folder: str, entries: list[Entry]) -> None:
        self.folder, self.key_folder, self.left = folder, key_folder, iter(entries)
        self.files, self.folders = FreshKeys(), FreshKeys()
        self._entries = entries
        self._by_stem: dict[str, list[Entry]] | None = None

    def files_of(self, stem: str) -> list[Entry]:
        """Its plain files that have this name but for their suffix, by name."""
        if self._by_stem is None:
            self._by_stem = {}
            for entry in self._entries:
                if not (entry.is_folder or entry.other):
                    self._by_stem.setdefault(entry.name.rpartition(".")[0], []).append(entry)
        return self._by_stem.get(stem, [])
