"""What lies below a folder: its image files in a fixed order, each with the key that it will have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError
from shards.keys import Keys
from shards.manifest import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Found:
    """A file: its path below the source, the key of its sample (none for what is no image), and how many bytes it has.
    """

    path: str
    key: str
    size: int


def walk_folder(source: Path) -> Iterator[Found]:
    """Files below a folder, depth first, each folder's in the order of their names; memory of one branch of folders.

    Links to files are followed, links to folders are not: they may lead in a circle.

    Raises:
        InputError: a folder that cannot be listed.
    """
    yield from _walk(str(source), "", "")


def _walk(root: str, folder: str, key_folder: str) -> Iterator[Found]:
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        text = f"{error.filename}: cannot be listed ({error.strerror}); mend its permissions or move it away"
        raise InputError(text) from error
    files, folders = Keys(), Keys()
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, f"{folder}{entry.name}/", f"{key_folder}{folders.of_folder(entry.name)}/")
            continue
        path = folder + entry.name
        is_image = entry.name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not _leads_to_folder(entry)
        yield Found(path, key_folder + files.of_file(entry.name) if is_image else "", _size(entry))


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and os.path.isdir(entry.path)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link that leads nowhere; reading it will say so
        return -1
