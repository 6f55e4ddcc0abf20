"""A run's checkpoints on disk: what is whole, what is kept, what goes.

    checkpoints/
      step-00001000/
        shard-00001-model-00001-of-00001.safetensors    one file per rank (torch.distributed.checkpoint)
        ...
        progress.json                                   step, configuration, size and SHA-256 of every file
        rollbacks.jsonl                                 only where the run went back to it: see rollback.py
      step-00002000/
      step-00003000.damaged-1/                          what the run could not continue from
      latest                                            names the newest whole one, for people and scripts

A folder is written under a temporary name, made durable and then renamed, so whatever has a final name is whole. Later
damage (a disk that loses bits, a truncated file) shows in the checksums. Nothing in a checkpoint is
executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shards.ground.files import atomic_write, names_in, naming, remove_partial_files, sync_folder

PROGRESS = "progress.json"
LATEST = "latest"
ROLLBACKS = "rollbacks.jsonl"

_PATIENCE_S = 5.0
_AGAIN_S = 1.0
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

Read = TypeVar("Read")


@dataclass(frozen=True)
class FileStamp:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; `progress` is what `progress.json` holds."""

    path: Path
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that were complete when it was saved: the first step to do."""
        return int(self.progress["step"])

    @property
    def content_hash(self) -> str:
        """Identifies its content by the checksums it was written with; reads no weights."""
        files = sorted(self.progress["files"].items())
        lines = "".join(f"{name} {stamp['size']} {stamp['sha256']}\n" for name, stamp in files)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"

    def damage(self, rank: int = 0, world_size: int = 1) -> str:
        """What is wrong with its files, empty if nothing is. Each of several ranks checks its part of the files.

        Raises:
            PermissionError: this user may not read them; they may be whole.
        """
        for name, stamp in sorted(self.progress["files"].items())[rank::world_size]:
            try:
                found = _asked_twice(stamp_of, self.path / name)
            except PermissionError:
                raise
            except OSError as error:
                return f"{name}: {error.strerror}"
            if found.size != stamp["size"]:
                return f"{name} has {found.size} bytes instead of {stamp['size']}"
            if found.sha256 != stamp["sha256"]:
                return f"{name} is not what was written (SHA-256)"
        return ""


def stamp_of(path: Path) -> FileStamp:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileStamp(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def open_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None if its mark is missing or damaged. Files are not checked.

    Raises:
        PermissionError: this user may not read it; it may be whole.
    """
    try:
        progress = json.loads(_asked_twice(Path.read_text, path / PROGRESS))
        checkpoint = Checkpoint(path, progress)
        assert checkpoint.step >= 0
        stamps = [(stamp["size"], stamp["sha256"]) for stamp in progress["files"].values()]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return None
    return checkpoint if stamps else None


def _asked_twice(read: Callable[[Path], Read], path: Path) -> Read:
    """What a file says; a file system may fail for a moment (EIO, ESTALE, ETIMEDOUT), and the file be whole."""
    with naming(path):
        try:
            return read(path)
        except (*_NOT_THERE, PermissionError):
            raise
        except OSError:
            time.sleep(_AGAIN_S)
            return read(path)


def folder_of(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint, in a run's folder of checkpoints."""
    return folder / f"step-{step:08d}"


def named_steps(folder: Path) -> list[int]:
    """Steps of a run's checkpoints by the names of their folders, newest first. Other names are a user's own copies."""
    return steps_of(names_in(folder))


def steps_of(names: Iterable[str]) -> list[int]:
    """The steps that these names of folders are those of, newest first."""
    digits = [name.removeprefix("step-") for name in names if name.startswith("step-")]
    return sorted((int(one) for one in digits if one.isdecimal() and one == f"{int(one):08d}"), reverse=True)


def newest_first(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run by their marks, newest first; `Checkpoint.damage` tells whether files are intact."""
    found = {step: open_checkpoint(folder_of(folder, step)) for step in named_steps(folder)}
    return [checkpoint for step, checkpoint in found.items() if checkpoint is not None and checkpoint.step == step]


def find_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a run whose files are intact, None if there is none."""
    return next((checkpoint for checkpoint in newest_first(folder) if not checkpoint.damage()), None)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process has half written or half removed, and make `latest` name the newest."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove_partial_files(folder)
    newest = newest_first(folder)
    if newest:
        _point_latest_to(newest[0].path)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which it is none of the run's; returns that."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.replace(path, aside)
    sync_folder(path.parent)
    return aside


def make_newest(checkpoint: Checkpoint) -> list[Path]:
    """Set aside what is newer than the checkpoint that a run continues from, all of it damaged; returns the names."""
    folder = checkpoint.path.parent
    aside = [set_aside(folder_of(folder, step)) for step in named_steps(folder) if step > checkpoint.step]
    if aside:
        _point_latest_to(checkpoint.path)
    return aside


def begin(folder: Path, step: int, owner: int = 0) -> Path:
    """An empty folder to write a checkpoint into.

    Args:
        owner: number of the run folder's owner: a rank left behind by a former owner must not write into this folder.
    """
    temporary = folder / f".step-{step:08d}.{owner}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, progress: dict[str, Any], files: Mapping[str, FileStamp]) -> Path:
    """Give a folder, whose files are durable, its final name.

    Raises:
        OSError: a file is missing or has the wrong size: ranks have written to different places.
    """
    _wait_for_files(temporary, files)
    stamps = {name: {"size": stamp.size, "sha256": stamp.sha256} for name, stamp in sorted(files.items())}
    with atomic_write(temporary / PROGRESS) as file:
        file.write(json.dumps({**progress, "files": stamps}, indent=1).encode())
    final = folder_of(temporary.parent, progress["step"])
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    sync_folder(final.parent)
    _point_latest_to(final)
    return final


def _wait_for_files(folder: Path, files: Mapping[str, FileStamp]) -> None:
    """Wait until all files that ranks reported are visible here; a network file system may show them late."""
    deadline = time.monotonic() + _PATIENCE_S
    for name, stamp in sorted(files.items()):
        while (size := _size_of(folder / name)) != stamp.size:
            if time.monotonic() > deadline:
                found = f"{size} bytes instead of {stamp.size}" if size >= 0 else "not there"
                raise OSError(
                    f"{folder / name}, which a rank has written, is {found} on rank 0; do all nodes share run.dir?"
                )
            time.sleep(0.1)


def bytes_of(path: Path) -> bytes | None:
    """The content of a small file; None if there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _size_of(path: Path) -> int:
    """Size in bytes; -1 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def remove_old(folder: Path, *, published: int, keep: int, keep_every: int) -> None:
    """Remove all checkpoints except the newest `keep` and those at multiples of `keep_every` steps (0: none of these).

    Args:
        published: step of the one that is known to be whole: it is always left, and newer ones do not count.
    """
    known = [checkpoint for checkpoint in newest_first(folder) if checkpoint.step <= published]
    for checkpoint in known[keep:]:
        if not (keep_every and checkpoint.step % keep_every == 0):
            _remove(checkpoint.path)


def _point_latest_to(checkpoint: Path) -> None:
    with atomic_write(checkpoint.parent / LATEST) as file:
        file.write(f"{checkpoint.name}\n".encode())


def _remove(path: Path) -> None:
    # Renamed first: an interrupted removal must not leave half a checkpoint under a final name.
    doomed = path.with_name(f".{path.name}.removing")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
