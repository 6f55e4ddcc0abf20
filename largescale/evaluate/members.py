"""Members of a sample beside its image (labels, masks, boxes), read from the tars: the index has images alone."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from largescale.data.corpora import Corpus
from largescale.data.reader import SampleError, ShardReader
from shards.format.tar import walk
from shards.ground.errors import InputError

_TARS = 8
"""Tars whose members are remembered."""

Spans = dict[str, tuple[int, int]]
"""Where in a tar the bytes of a sample's members are, by suffix."""


class MemberReader:
    """Reads members of the samples of a corpus; threads may share it."""

    def __init__(self, corpus: Corpus) -> None:
        self.reader = ShardReader([corpus])
        self._known: OrderedDict[Path, dict[int, Spans]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample_id: int, suffix: str) -> bytes | None:
        """The bytes of a member such as `json` or `mask.png`; None if the sample has none of that suffix.

        Raises:
            InputError: the tar is away, or is not what was indexed.
        """
        try:
            path, image = self.reader.place(sample_id)
        except SampleError as error:
            raise InputError(str(error)) from error
        with self._lock:
            spans = self._spans_of(path)
        if image not in spans:
            raise InputError(f"{path}: has no sample whose image begins at byte {image}; run `shards verify`")
        if suffix not in spans[image]:
            return None
        start, size = spans[image][suffix]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def name(self, sample_id: int) -> str:
        """Tar and key of a sample, for messages."""
        about = self.reader.describe(sample_id)
        return f"{about['shard']}, key {about['key']}"

    def _spans_of(self, path: Path) -> dict[int, Spans]:
        if path not in self._known:
            with path.open("rb") as file:
                found = {place[0]: sample.members for sample in walk(file, path) if (place := sample.image())}
            self._known[path] = found
            if len(self._known) > _TARS:
                self._known.popitem(last=False)
        self._known.move_to_end(path)
        return self._known[path]
