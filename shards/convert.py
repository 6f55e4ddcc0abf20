"""`shards convert`: a folder of images to WebDataset shards, bytes kept as they are.

The listing is cut into shards before anything is read, so the number of worker processes never changes a byte; an
unreadable file only makes its shard smaller. The manifest is written last: without it a folder is not finished.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.errors import InputError
from shards.files import atomic_write
from shards.images import ImageError, inspect
from shards.keys import sample_keys
from shards.manifest import (
    IMAGE_SUFFIXES,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    check_files,
    index_path,
    write_index,
    write_manifest,
)
from shards.tar import file_checksum, index_tar

SKIPPED_NAME = "skipped.jsonl"


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        name: first part of the shards' names.
        labels: "folder" takes the first folder below the source as the class, "none" writes no labels.
        samples_per_shard: files listed for one shard.
        workers: processes.
        shuffle: seed of a permutation of the listing, None to keep it sorted.
        force: replace a finished folder.
    """

    name: str
    labels: str = "none"
    samples_per_shard: int = 10_000
    workers: int = 1
    shuffle: int | None = None
    force: bool = False


@dataclass(frozen=True)
class _Task:
    """One shard to write: its tar, and for each sample the path below the source, the key and the label."""

    source: Path
    tar: Path
    files: list[tuple[str, str, int]]


@dataclass(frozen=True)
class _Written:
    entry: ShardEntry | None
    skipped: list[tuple[str, str]]


def convert(source: Path, out: Path, options: Options) -> Manifest:
    """Convert a folder of images.

    Raises:
        InputError: nothing to convert, or a target that must not be overwritten.
    """
    _check_target(source, out, options)
    files, ignored = list_images(source)
    if options.shuffle is not None:
        files = [files[i] for i in np.random.default_rng(options.shuffle).permutation(len(files))]
    classes = _classes(source, files) if options.labels == "folder" else ()
    out.mkdir(parents=True, exist_ok=True)
    _clear(out)
    written = list(_write_all(_tasks(source, out, files, classes, options), options.workers, len(files)))
    entries = tuple(result.entry for result in written if result.entry is not None)
    skipped = [row for result in written for row in result.skipped] + [(path, "not an image file") for path in ignored]
    if not entries:
        raise InputError(f"{source}: none of {len(files)} images can be read ({skipped[0][1]}); nothing was written")
    with atomic_write(out / SKIPPED_NAME) as file:
        for path, reason in skipped:
            file.write((json.dumps({"source": path, "reason": reason}) + "\n").encode())
    manifest = Manifest(
        out, options.name, entries, classes, source.name, _settings(options),
        dict(Counter(reason for _, reason in skipped)),
    )
    check_files(manifest)
    write_manifest(manifest)
    return manifest


def list_images(source: Path) -> tuple[list[str], list[str]]:
    """Image files below a folder, and other files, as sorted relative paths; links to folders are not followed."""
    images, others = [], []
    for folder, folders, names in os.walk(source, onerror=_unreadable_folder):
        folders.sort()
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), source)
            is_image = name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
            (images if is_image else others).append(path)
    if not images:
        raise InputError(
            f"{source}: no images below this folder (looked for {', '.join(IMAGE_SUFFIXES)}; "
            f"{len(others)} other files); pass the folder that holds them"
        )
    return sorted(images), sorted(others)


def _unreadable_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); mend its permissions or move it away")


def _check_target(source: Path, out: Path, options: Options) -> None:
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; pass the folder that holds the images")
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise InputError(f"{out}: lies inside {source}; choose a folder outside the images")
    if (out / MANIFEST_NAME).exists() and not options.force:
        raise InputError(f"{out}: holds finished shards; choose another folder, or pass --force to replace them")
    foreign = [path.name for path in out.glob("*.tar") if not index_path(path).exists()] if out.is_dir() else []
    if foreign:
        raise InputError(f"{out}: holds tars of unknown origin ({sorted(foreign)[0]}); choose another folder")
    for key in ("samples_per_shard", "workers"):
        if getattr(options, key) < 1:
            raise InputError(f"--{key.replace('_', '-')}={getattr(options, key)}: expected at least 1")
    if "/" in options.name or "." in options.name or not options.name:
        raise InputError(f"--name={options.name}: expected a name without dots and slashes")


def _clear(out: Path) -> None:
    """Remove what an earlier or interrupted conversion left, the manifest first."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for tar in out.glob("*.tar"):
        if index_path(tar).exists():
            tar.unlink()
    for pattern in (f"*{INDEX_SUFFIX}", ".*.writing", SKIPPED_NAME):
        for path in out.glob(pattern):
            path.unlink()


def _classes(source: Path, files: list[str]) -> tuple[str, ...]:
    loose = [path for path in files if "/" not in path]
    if loose:
        raise InputError(
            f"{source / loose[0]}: lies in no class folder, which --labels folder needs; move it into one, "
            f"or convert without labels"
        )
    return tuple(sorted({_printable(path.split("/")[0]) for path in files}))


def _printable(name: str) -> str:
    """Names that are not UTF-8 come from the file system with surrogates, which no file format takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _tasks(source: Path, out: Path, files: list[str], classes: tuple[str, ...], options: Options) -> list[_Task]:
    number = {name: place for place, name in enumerate(classes)}
    keys = sample_keys(Path(path) for path in files)
    rows = [
        (path, key, number[_printable(path.split("/")[0])] if classes else -1)
        for path, key in zip(files, keys, strict=True)
    ]
    size = options.samples_per_shard
    return [
        _Task(source, out / f"{options.name}-{start // size:06d}.tar", rows[start : start + size])
        for start in range(0, len(rows), size)
    ]


def _write_all(tasks: list[_Task], workers: int, num_files: int) -> Iterator[_Written]:
    with tqdm(total=num_files, unit="image", desc="convert", leave=False, mininterval=0.5) as bar:
        if workers == 1 or len(tasks) == 1:
            results: Any = map(_write_shard, tasks)
        else:
            pool = ProcessPoolExecutor(min(workers, len(tasks)))
            results = pool.map(_write_shard, tasks)
        for task, result in zip(tasks, results, strict=True):
            bar.update(len(task.files))
            yield result


def _write_shard(task: _Task) -> _Written:
    """Write one tar and its index; a shard without a readable image is not written."""
    skipped: list[tuple[str, str]] = []
    labels: list[int] = []
    with atomic_write(task.tar) as file:
        with tarfile.open(fileobj=file, mode="w|") as tar:
            for path, key, label in task.files:
                try:
                    payload = (task.source / path).read_bytes()
                    inspect(payload, decode=True)
                except ImageError as error:
                    skipped.append((_printable(path), str(error)))
                    continue
                except OSError as error:
                    skipped.append((_printable(path), f"cannot be read: {error.strerror}"))
                    continue
                _add_sample(tar, key, path.rpartition(".")[2].lower(), payload, label)
                labels.append(label)
        if labels:
            # The index comes first: a tar with an index is known as one of ours, wherever a conversion is killed.
            file.flush()
            index = index_tar(Path(file.name)).index
            assert len(index) == len(labels), "the tar does not hold what was written to it"
            index.label[:] = labels
            write_index(index, index_path(task.tar))
    if not labels:
        task.tar.unlink()
        return _Written(None, skipped)
    entry = ShardEntry(task.tar.name, len(labels), task.tar.stat().st_size, file_checksum(task.tar),
                       file_checksum(index_path(task.tar)))
    return _Written(entry, skipped)


def _add_sample(tar: tarfile.TarFile, key: str, suffix: str, payload: bytes, label: int) -> None:
    """Add the members of a sample as webdataset's TarWriter(mtime=0) does, byte for byte (it would import torch)."""
    members = {suffix: payload, **({"cls": str(label).encode()} if label >= 0 else {})}
    for name in sorted(members):
        member = tarfile.TarInfo(f"{key}.{name}")
        member.size, member.mtime, member.mode = len(members[name]), 0, 0o444
        member.uname = member.gname = "bigdata"
        tar.addfile(member, io.BytesIO(members[name]))


def _settings(options: Options) -> dict[str, Any]:
    return {"labels": options.labels, "samples_per_shard": options.samples_per_shard, "shuffle": options.shuffle}
