"""A second home for checkpoints: any store that fsspec knows (s3://, gs://, abfs://, sftp://, a second disk).

Published checkpoints are copied there (see `checkpoint/copier.py`), `progress.json` last, which makes
the copy whole. A run whose folder has nothing newer fetches from there before it continues.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from largescale.checkpoint.folder import (
    PROGRESS,
    ROLLBACKS,
    Checkpoint,
    FileStamp,
    bytes_of,
    folder_of,
    open_checkpoint,
    set_aside,
    stamp_of,
    steps_of,
)
from largescale.distributed.bounded import within
from shards.ground.errors import InputError
from shards.ground.files import atomic_write, sync_file, sync_folder
from shards.stores.store_errors import is_denied

_log = logging.getLogger(__name__)

_ANSWER_S = 60.0
"""A store that is silent for this long is away."""
_SLOWEST = 1e6
"""Lowest rate at which a file is expected to be copied, bytes per second."""


class MirrorAway(Exception):
    """The store did not do what it was asked to; the message is one line that says why."""


class OfAnotherRun(MirrorAway):
    """The store holds copies of another run, which must be neither used nor replaced."""


class Mirror:
    """The copies of a run's checkpoints.

    Args:
        url: folder in a store; its credentials come from the environment, as the store's library documents.
        answer_s: time without an answer after which the store counts as away.
        other_run: given the content of a copy's `progress.json`, says why it belongs to another run; empty if
            it does not.

    Raises:
        InputError: a scheme that fsspec does not know, or whose library is not installed.
    """

    def __init__(
        self, url: str, answer_s: float = _ANSWER_S, other_run: Callable[[dict[str, Any]], str] = lambda _: ""
    ) -> None:
        self.url, self._answer_s, self._other_run = url, answer_s, other_run
        self._connect()

    def _connect(self) -> None:
        # Imported late: most runs have no mirror.
        import fsspec

        try:
            # An instance of its own: one that others use would go on with the credentials that it has read.
            self._fs, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise InputError(f"checkpoint.mirror={self.url}: {error}") from error
        self._root = root.rstrip("/")

    def steps(self) -> list[int]:
        """Steps of the whole copies, newest first.

        Raises:
            MirrorAway: the store cannot be used, as in the methods below.
            OfAnotherRun: the newest copy is of another run.
        """
        steps = [step for step in self._begun() if PROGRESS in self._names_in(f"{self._root}/step-{step:08d}")]
        if steps:
            self._require_ours(f"step-{steps[0]:08d}")
        return steps

    def _begun(self) -> list[int]:
        """Steps of all copies, whole or not, newest first."""
        self._ask(self._fs.invalidate_cache)
        return steps_of(self._names_in(self._root))

    def _names_in(self, folder: str) -> list[str]:
        # Not by a pattern, in which the characters []?* of the mirror's own name would have a meaning.
        try:
            return [path.rstrip("/").split("/")[-1] for path in self._ask(lambda: self._fs.ls(folder, detail=False))]
        except _Missing:
            return []

    def _require_ours(self, name: str) -> None:
        with suppress(ValueError):  # `fetch_newer` refuses a mark that cannot be read
            if other := self._other_run(json.loads(self._read(name, PROGRESS) or b"")):
                raise OfAnotherRun(f"{name} there belongs to another run: {other}. Use another mirror for each run")

    def newest_progress(self) -> dict[str, Any] | None:
        """What `progress.json` of the newest whole copy holds; None without one, or where it cannot be read."""
        for step in self.steps()[:1]:
            with suppress(ValueError):
                return json.loads(self._read(f"step-{step:08d}", PROGRESS) or b"")
        return None

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Whether the mirror has a whole copy of this very checkpoint."""
        return all(self._is_there(checkpoint, name) for name in (PROGRESS, ROLLBACKS))

    def _is_there(self, checkpoint: Checkpoint, name: str) -> bool:
        return self._read(checkpoint.path.name, name) == bytes_of(checkpoint.path / name)

    def begin(self, checkpoint: Checkpoint) -> bool:
        """Make room for a copy: whatever has its name no longer counts as whole.

        Returns:
            False where the files are there already and only `complete` is due: a run that goes back to a checkpoint
            adds what it leaves out.
        """
        folder = f"{self._root}/{checkpoint.path.name}"
        if self._is_there(checkpoint, PROGRESS):
            return False
        self._ask(lambda: self._fs.makedirs(folder, exist_ok=True))
        self._remove(f"{folder}/{PROGRESS}")
        return True

    def copy_files(self, checkpoint: Checkpoint, part: int, parts: int) -> None:
        """Copy this part of a published checkpoint's files."""
        for name, stamp in sorted(checkpoint.progress["files"].items())[part::parts]:
            source, target = str(checkpoint.path / name), f"{self._root}/{checkpoint.path.name}/{name}"
            self._ask(partial(self._fs.put_file, source, target), stamp["size"])

    def complete(self, checkpoint: Checkpoint) -> None:
        """Mark a copy as whole, once all its files are there."""
        for name in (ROLLBACKS, PROGRESS):
            content = bytes_of(checkpoint.path / name)
            target = f"{self._root}/{checkpoint.path.name}/{name}"
            if content is None:
                self._remove(target)
            else:
                self._ask(partial(self._fs.pipe_file, target, content))

    def remove_but(self, kept: set[int]) -> None:
        """Remove copies of steps that are not kept and lie before the newest kept one, also half copies: what a killed
        process left of a copy, or of removing one.
        """
        self.steps()  # none are removed where the newest is of another run
        for step in self._begun():
            if step not in kept and step < max(kept, default=0):
                folder = f"{self._root}/step-{step:08d}"
                # The mark first; and file by file, since `rm` of a store takes names for patterns.
                for name in sorted(self._names_in(folder), key=lambda name: name != PROGRESS):
                    self._remove(f"{folder}/{name}")
                with suppress(MirrorAway):  # stores of objects have no folders, and each says so in another way
                    self._ask(partial(self._fs.rmdir, folder))

    def fetch_newer(self, folder: Path, than: int = -1) -> bool:
        """Fetch the newest copy to the run's folder, if it is of a later step than this one. Called by one process.

        Files that an interrupted fetch has brought are not fetched again; a checkpoint here of the same step, which is
        damaged, is set aside. If the newest is the checkpoint of this step here, what a run on another machine, which
        went back to it since, leaves out is left out here too.

        Returns:
            Whether there was one of a later step.

        Raises:
            MirrorAway: the store cannot be used.
            InputError: the copy lists a file outside of its folder or is not one of ours.
        """
        newest = max(self.steps(), default=-1)
        temporary = folder / f".fetching-step-{newest:08d}.{socket.gethostname()}"
        for leftover in folder.glob(".fetching-*"):
            if newest <= than or leftover != temporary:
                shutil.rmtree(leftover)
        if newest <= than:
            if newest == than:
                self._adopt_rollbacks(folder_of(folder, than))
            return False
        name = f"step-{newest:08d}"
        _log.info("fetching %s from %s", name, self.url)
        temporary.mkdir(parents=True, exist_ok=True)
        mark = self._read(name, PROGRESS) or b""
        for file, stamp in _files(mark, f"{self.url}/{name}").items():
            source, target = f"{self._root}/{name}/{file}", temporary / file
            if not target.exists() or stamp_of(target) != stamp:
                self._ask(partial(self._fs.get_file, source, str(target)), stamp.size)
                sync_file(target)
        if (rollbacks := self._read(name, ROLLBACKS)) is not None:
            (temporary / ROLLBACKS).write_bytes(rollbacks)
            sync_file(temporary / ROLLBACKS)
        (temporary / PROGRESS).write_bytes(mark)
        sync_file(temporary / PROGRESS)
        checkpoint = open_checkpoint(temporary)
        damage = checkpoint.damage() if checkpoint else f"{PROGRESS} cannot be read"
        if damage:
            shutil.rmtree(temporary)
            raise InputError(f"{self.url}/{name}: {damage}; remove that copy, or checkpoint.mirror, and try again")
        if (folder / name).exists():
            set_aside(folder / name)
        os.replace(temporary, folder / name)
        sync_folder(folder)
        return True

    def _adopt_rollbacks(self, ours: Path) -> None:
        checkpoint = open_checkpoint(ours)
        if checkpoint is None or not self._is_there(checkpoint, PROGRESS):
            return
        theirs = self._read(ours.name, ROLLBACKS) or b""
        if not (bytes_of(ours / ROLLBACKS) or b"").startswith(theirs):  # else at most ours is not copied yet
            _log.info("%s: leaving out what its copy in %s does", ours, self.url)
            with atomic_write(ours / ROLLBACKS) as file:
                file.write(theirs)

    def _read(self, name: str, file: str) -> bytes | None:
        """A small file of a copy; None if there is no such file."""
        try:
            return self._ask(lambda: self._fs.cat_file(f"{self._root}/{name}/{file}"))
        except _Missing:
            return None

    def _remove(self, path: str) -> None:
        with suppress(_Missing):
            self._ask(lambda: self._fs.rm_file(path))

    def _ask(self, request: Callable[[], Any], num_bytes: int = 0) -> Any:
        try:
            return within(self._answer_s + num_bytes / _SLOWEST, request)
        except FileNotFoundError as error:
            raise _Missing(_line(error)) from error
        except Exception as error:  # every store's library raises its own kinds of errors
            if is_denied(error):  # the next try reads credentials again, which may have been renewed
                with suppress(Exception):
                    self._connect()
            raise MirrorAway(_line(error)) from error


class _Missing(MirrorAway):
    """There is no such file."""


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _files(mark: bytes, where: str) -> dict[str, FileStamp]:
    """The files that a mark lists, by name."""
    try:
        listed = json.loads(mark)["files"]
        stamps = {name: FileStamp(int(stamp["size"]), str(stamp["sha256"])) for name, stamp in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: {PROGRESS} cannot be read; remove that copy") from error
    for name in stamps:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{where}: {PROGRESS} lists {name!r}, which is not a checkpoint file; remove that copy")
    return stamps
