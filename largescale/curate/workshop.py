"""The folder in which a curation is worked out: `OUT.unfinished`, beside OUT, which it becomes in the end.

    curation.json          what is being made, from what; another wish begins again
    coarse.npz             coarse centroids
    sorted-000000.npy      rows of a few feature files, by coarse cluster, as they are stored
    sorted-000000-samples.npy   their sample numbers
    sorted-000000.npz      where each cluster ends
    epsilon.npz            the epsilon that was looked for
    dropped-000000.npz     duplicates of a coarse cluster
    first-000000.npz       clusters of the first level in a coarse cluster
    level-2.npz            clusters of a level, and which of them those below belong to
    result/                what becomes OUT

Every file is whole or absent, and does not depend on the number of ranks: a command that was killed goes on from them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from largescale.evaluate.made_from import difference
from largescale.processes import barrier, on_rank_0, rank, together, world_size
from shards.ground.errors import InputError
from shards.ground.files import at_work_in, atomic_write, remove_partial_files

RECORD = "curation.json"
_PATTERNS = ("coarse.npz", "epsilon.npz", "*-*.npz", "sorted-*.npy", RECORD)
"""Of files, in the order in which they are removed: what says that something is done before that itself."""
_QUIET_S = 10.0
"""Seconds between two lines of progress."""

_log = logging.getLogger(__name__)


class Workshop:
    """The stages of one curation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def result(self) -> Path:
        """What becomes OUT."""
        return self.folder / "result"

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What a stage has found.

        Raises:
            InputError: it is damaged, or cannot be read.
        """
        path = self.folder / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise InputError(f"{path}: cannot be read ({error}); if it is damaged, remove {self.folder}") from error

    def arrays_on_all(self, name: str) -> dict[str, np.ndarray]:
        """`arrays`, which all ranks read. Collectives: every rank must call it; those of `together`."""
        return together(lambda: self.arrays(name))

    def has(self, name: str) -> bool:
        """Whether a stage, or a part of it, is done."""
        return (self.folder / f"{name}.npz").is_file()

    def keep(self, name: str, **arrays: np.ndarray) -> None:
        """Write what a stage has found."""
        with atomic_write(self.folder / f"{name}.npz") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def keep_rows(self, name: str, rows: np.ndarray) -> None:
        """Write an array that `rows` reads in parts."""
        with atomic_write(self.folder / f"{name}.npy") as file:
            np.save(file, rows, allow_pickle=False)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Some rows of an array that stays on disk, in a file that is open only meanwhile: there may be thousands.

        Raises:
            InputError: it is damaged, or cannot be read.
        """
        path = self.folder / f"{name}.npy"
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                width = math.prod(shape[1:])
                file.seek(start * width * dtype.itemsize, os.SEEK_CUR)
                return np.fromfile(file, dtype, (stop - start) * width).reshape(stop - start, *shape[1:])
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); if it is damaged, remove {self.folder}") from error

    def remove(self) -> None:
        """Remove all of it, its record last: what is left after a kill is known as a workshop."""
        shutil.rmtree(self.result, ignore_errors=True)
        _clear(self.folder)
        shutil.rmtree(self.folder)

    def share(self, what: str, parts: Iterable[int], name: Callable[[int], str], make: Callable[[int], None]) -> None:
        """Have every part made that is not there; ranks share them.

        Args:
            what: is being done, for people.
            parts: their numbers, in the order in which they are made.
            name: of a part's arrays, written last.
            make: makes a part.

        Raises:
            InputError: on all ranks, if one of them did.

        Collectives: every rank must call it; `together`, and one barrier before it.
        """
        missing = [part for part in parts if not self.has(name(part))]
        barrier()  # all ranks have looked before any makes one
        own = missing[rank() :: world_size()]

        def work() -> None:
            said = time.monotonic()
            for done, part in enumerate(own):
                if time.monotonic() - said > _QUIET_S:
                    said = time.monotonic()
                    _log.info("%s: %d%%", what, 100 * done / len(own))
                make(part)

        if missing:
            _log.info("%s", what)
        together(work)


@contextmanager
def workshop(out: Path, stamp: dict[str, Any]) -> Iterator[Workshop]:
    """The workshop for a result, with what was done of it before; work of another wish is removed.

    Raises:
        InputError: it cannot be made, or another command is at work there.

    Collectives: every rank must call it; one broadcast of an object.
    """
    folder = out.with_name(f"{out.name}.unfinished")
    on_rank_0(lambda: _begin(folder, stamp))
    with at_work_in(folder, with_others=True):
        yield Workshop(folder)


def remove_workshop(out: Path) -> None:
    """Remove the workshop of a result that is in its place, if there is one; its record goes last."""
    folder = out.with_name(f"{out.name}.unfinished")
    if (folder / RECORD).is_file():
        with at_work_in(folder, with_others=False):
            Workshop(folder).remove()


def _clear(folder: Path) -> None:
    for pattern in _PATTERNS:
        for path in folder.glob(pattern):
            path.unlink()


def _begin(folder: Path, stamp: dict[str, Any]) -> None:
    with at_work_in(folder, with_others=False):
        remove_partial_files(folder)
        try:
            before = json.loads((folder / RECORD).read_text())
        except (OSError, ValueError):
            before = None
        if before is None and any(folder.iterdir()):
            raise InputError(f"{folder}: holds something else than an unfinished curation; move it away")
        why = difference(before, stamp) if before is not None else ""
        if why:
            _log.warning("%s: begins again: %s", folder, why)
            _clear(folder)
        elif before is not None:
            _log.info("%s: goes on where it was", folder)
        shutil.rmtree(folder / "result", ignore_errors=True)
        with atomic_write(folder / RECORD) as file:
            file.write((json.dumps(stamp, indent=1) + "\n").encode())
