"""Members of a sample beside its image (labels, masks, boxes), read from the tars: the index has images alone."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
from torch import Tensor

from largescale.data.corpora import Corpus
from largescale.data.decode import decode
from largescale.data.reader import SampleError, ShardReader
from shards.format.tar import walk
from shards.ground.errors import InputError

_log = logging.getLogger(__name__)


class MemberReader:
    """Reads one member of each sample of a corpus; threads may share it.

    A tar is walked when its first member is wanted; where its members are is remembered, 24 bytes per sample, so that
    members can then be read in any order.

    Args:
        corpus: what is read.
        suffix: of the member, such as `json` or `mask.png`.

    Attributes:
        unreadable: why, of images that could not be read, by tar and key.
    """

    def __init__(self, corpus: Corpus, suffix: str) -> None:
        self.reader, self._suffix = ShardReader([corpus]), suffix
        self._known: dict[Path, np.ndarray] = {}
        self._walking: dict[Path, threading.Lock] = {}
        self._lock = threading.Lock()
        self.unreadable: dict[str, str] = {}

    def read(self, sample_id: int) -> bytes | None:
        """The bytes of the member; None if the sample has none of that suffix.

        Raises:
            InputError: the tar is away, or is not what was indexed.
        """
        try:
            path, image = self.reader.place(sample_id)
        except SampleError as error:
            raise InputError(str(error)) from error
        spans = self._spans_of(path)
        row = np.searchsorted(spans[:, 0], image, side="right") - 1
        if row < 0 or spans[row, 0] != image:
            raise InputError(f"{path}: has no sample whose image begins at byte {image}; run `shards verify`")
        start, size = spans[row, 1:].tolist()
        if start < 0:
            return None
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def image(self, sample_id: int, max_pixels: int) -> Tensor | None:
        """The upright image of a sample, uint8 [3, H, W]; None if it cannot be read, of which the log has a line."""
        try:
            return decode(self.reader.read(sample_id), max_pixels=max_pixels)
        except SampleError as error:
            name = self.name(sample_id)
            with self._lock:
                known = name in self.unreadable
                self.unreadable[name] = str(error)
            if not known:
                _log.warning("%s: nothing is learned or measured of it: %s", name, error)
            return None

    def name(self, sample_id: int) -> str:
        """Tar and key of a sample, for messages."""
        about = self.reader.describe(sample_id)
        return f"{about['shard']}, key {about['key']}"

    def _spans_of(self, path: Path) -> np.ndarray:
        """What `_walked` says of a tar. Whoever wants a tar waits while it is walked, and for no other one."""
        with self._lock:
            walking = self._walking.setdefault(path, threading.Lock())
        with walking:
            if path not in self._known:
                self._known[path] = _walked(path, self._suffix)
            return self._known[path]


def _walked(path: Path, suffix: str) -> np.ndarray:
    """Where images begin, ascending, and where the member of each begins and its size, -1 for none: int64 [N, 3]."""
    with path.open("rb") as file:
        rows = [
            (image[0], *sample.members.get(suffix, (-1, 0)))
            for sample in walk(file, path)
            if (image := sample.image()) is not None
        ]
    spans = np.array(rows, np.int64).reshape(-1, 3)
    return spans[np.argsort(spans[:, 0], kind="stable")]
