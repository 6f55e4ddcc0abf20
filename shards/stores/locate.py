"""Shard folders on a disk or in a store, for commands that look at them: what is in a store is fetched for a while."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from pathlib import Path

from shards.format.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from shards.ground.errors import InputError
from shards.stores.store import Missing, Store, is_url


def manifest_at(location: str) -> Manifest:
    """The manifest of a shard folder; its `root` means nothing where that is a URL.

    Raises:
        InputError: no folder, no manifest, or one that does not describe shards.
    """
    if not is_url(location):
        return read_manifest(location)
    return parse_manifest(manifest_bytes(Store(location)), Path(), where=f"{location}/{MANIFEST_NAME}")


def manifest_bytes(store: Store) -> bytes:
    """The manifest of a shard folder in a store, as it is stored.

    Raises:
        InputError: there is none, or the store does not answer.
    """
    try:
        return store.read(MANIFEST_NAME)
    except Missing as error:
        raise InputError(
            f"{store.url}: no {MANIFEST_NAME} there, so this is not a (finished) shard folder; upload the whole folder "
            f"that `shards convert` or `shards index` made"
        ) from error


@contextmanager
def fetched(location: str, names: Iterable[str]) -> Iterator[Path]:
    """A folder that holds these files of a shard folder, without those that are not there."""
    if not is_url(location):
        yield Path(location)
        return
    store = Store(location)
    with tempfile.TemporaryDirectory(prefix="shards-") as folder:
        for name in names:
            with suppress(Missing):
                store.fetch(name, Path(folder) / name, store.size(name))
        yield Path(folder)


def names_at(location: str) -> list[str]:
    """The files of a shard folder, by name."""
    if is_url(location):
        return [name for name, is_folder, _ in Store(location).entries() if not is_folder]
    return sorted(path.name for path in Path(location).iterdir() if path.is_file())


def process_context(*locations: str, clips: bool = False) -> BaseContext:
    """How to start processes: what a store's library, or FFmpeg, holds of threads and locks does not survive a fork."""
    if clips or any(map(is_url, locations)):
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)  # else a script would begin again
