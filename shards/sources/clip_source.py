"""Videos, and images with a sound of the same name beside them, as a source of clips: a folder, or a list."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shards.clips.names import NO_CLIP, is_sound, is_video
from shards.format.clip_writer import OWN_FACTS
from shards.ground.errors import InputError
from shards.images.names import is_image, suffix_of
from shards.sources.found import Found, first_folder, left_out, why_beside
from shards.sources.source import FolderSource, Level
from shards.sources.tables import READERS, ListSource, without_query
from shards.stores.folders import Entry, open_folder
from shards.stores.store import is_url

IMAGE_ALONE = "an image without a sound of its name beside it"
SOUND_ALONE = "a sound without an image of its name beside it"
OF_PAIR = "a second sound of an image"

_SOUND = "sound"
"""The column of a list that names the sound of an image."""

_USED = "the sound of a pair"
_BETWEEN = "\0"
"""In the place of a pair: no name holds it."""


class ClipFolder(FolderSource):
    """Videos and pairs below a folder. The place of a pair is the path of its image, and the name of its sound."""

    def is_pair(self, place: str) -> bool:
        """Whether it is an image with a sound."""
        return _BETWEEN in place

    def open(self, place: str) -> BinaryIO:
        """A video, or the image of a pair. OSError: it cannot be read."""
        return self._folder.open(place.partition(_BETWEEN)[0])

    def open_sound(self, place: str) -> BinaryIO:
        """The sound of a pair. OSError: it cannot be read."""
        path, _, sound = place.partition(_BETWEEN)
        return self._folder.open(os.path.join(os.path.dirname(path), sound))

    def columns(self, place: str) -> dict[str, Any]:
        """What is known of a file besides its place: nothing."""
        return {}

    def name(self, place: str) -> str:
        """See `Source`."""
        return place.partition(_BETWEEN)[0]

    def identity(self, place: str) -> str:
        """See `Source`."""
        return self.name(place)

    def _file(self, level: Level, entry: Entry) -> Found:
        place = level.folder + entry.name
        if reason := entry.other or why_beside(place):
            return left_out(place, reason)
        sounds = _sounds_of(level, entry.name) if is_image(entry.name) else []
        if not sounds and not is_video(entry.name):
            return left_out(place, _why_not(level, entry.name))
        key = level.key_folder + level.files.of_file(entry.name)
        if not sounds:
            return Found(place, key, entry.size, folder=first_folder(place))
        size = -1 if -1 in (entry.size, sounds[0].size) else entry.size + sounds[0].size
        return Found(f"{place}{_BETWEEN}{sounds[0].name}", key, size, folder=first_folder(place))

    def _walk(self) -> Iterator[Found]:
        """What became the sound of a pair is not left out, and no sample either."""
        return (found for found in super()._walk() if found.reason != _USED)


class ClipList(ListSource):
    """Videos that a list names, and images with the sound that a column `sound` names."""

    def is_pair(self, place: str) -> bool:
        """Whether it is an image with a sound."""
        return bool(json.loads(place).get(_SOUND))

    def open(self, place: str) -> BinaryIO:
        """A video, or the image of a pair. OSError: it cannot be read."""
        return self._open(json.loads(place)["path"])

    def open_sound(self, place: str) -> BinaryIO:
        """The sound of a pair. OSError: it cannot be read."""
        return self._open(json.loads(place)[_SOUND])

    def columns(self, place: str) -> dict[str, Any]:
        """What a row says besides."""
        return {name: value for name, value in super().columns(place).items() if name != _SOUND}

    def _open(self, path: str) -> BinaryIO:
        folder, name = self._find(path)
        try:
            return folder.open(name)
        except InputError:
            raise
        except ValueError as error:  # of a name that no file can have
            raise OSError(0, "not a possible path") from error

    def _why_left_out(self, row: dict[str, Any]) -> str:
        sound = row.get(_SOUND)
        if not isinstance(sound, str | None):
            raise InputError(
                f"{self.location}: column `{_SOUND}` of {row['path']} is not a path; expected text, or none"
            )
        if taken := next((name for name in OWN_FACTS if name in row and name != _SOUND), ""):
            raise InputError(
                f"{self.location}: column `{taken}` has a name that the json of every clip uses itself; rename it"
            )
        name = without_query(row["path"])
        return "" if is_video(name) or (sound and is_image(name)) else NO_CLIP


ClipSource = ClipFolder | ClipList


def open_clip_source(location: str | Path, *, label_column: str = "") -> ClipSource:
    """The videos, and the pairs of an image and a sound, at a path or URL.

    Raises:
        InputError: nothing is there, or nothing that clips can be cut from.
    """
    location = str(location)
    if suffix_of(os.path.split(location.rstrip("/"))[1]) in READERS and (is_url(location) or os.path.isfile(location)):
        return open_clips_as(ClipList.kind, location, label_column=label_column)
    if is_url(location) or os.path.isdir(location):
        return open_clips_as(ClipFolder.kind, location)
    what = "not a folder, nor a list" if os.path.exists(location) else "no such folder or file"
    raise InputError(
        f"{location}: {what}; for --clips pass a folder of videos (unpack archives first), or a list "
        f"({', '.join(f'.{name}' for name in READERS)}) with a column `path`"
    )


def open_clips_as(kind: str, location: str, *, label_column: str = "") -> ClipSource:
    """See `open_as`: "folder" or "list"."""
    if kind == ClipFolder.kind:
        return ClipFolder(open_folder(location))
    parent, name = os.path.split(location.rstrip("/"))
    return ClipList(open_folder(parent), name, label_column)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _sounds_of(level: Level, image: str) -> list[Entry]:
    """The sounds of an image's name, by name; the first one is used."""
    return [other for other in level.files_of(_stem(image)) if is_sound(other.name)]


def _why_not(level: Level, name: str) -> str:
    """Why a file is no sample by itself."""
    if is_image(name):
        return IMAGE_ALONE
    if not is_sound(name):
        return NO_CLIP
    beside = level.files_of(_stem(name))
    if not any(is_image(other.name) for other in beside):
        return SOUND_ALONE
    sounds = [other.name for other in beside if is_sound(other.name)]
    return _USED if sounds[0] == name else OF_PAIR
