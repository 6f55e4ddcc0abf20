"""Random access to the samples of shard folders: by id, through the index, from open tars."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from largescale.data.cache import NextUse, ShardLost
from largescale.data.clip_facts import ClipFacts, Place, facts_of, place_of_image, place_of_sound
from largescale.data.corpora import Corpus
from largescale.data.kept_shards import KeptShards
from largescale.data.patience import FolderPatience
from shards.format.shard_index import ShardIndex, how_to_mend, read_index
from shards.format.tar import file_checksum
from shards.ground.errors import InputError, line_of
from shards.ground.open_file import OpenFile

OPEN_ATTEMPTS = 3

_LOST_S, _LONGEST_LOST_S = 60.0, 1800.0
"""A lost shard is retried after the first time, then after twice as long each time, up to the second."""

_log = logging.getLogger(__name__)

NEIGHBOURS = 8
"""Samples of a shard that are tried in place of one before those of the next shard: what one image has, its neighbours
often have as well, and then the whole shard."""


class SampleError(Exception):
    """One sample cannot be used; the message is the reason. The stream counts it and takes a substitute."""


class RawSample(NamedTuple):
    """The stored bytes of one image, and its size in pixels according to its header."""

    payload: bytes
    width: int
    height: int


class Lost(NamedTuple):
    """Why a shard is lost, when (monotonic clock) it is retried, and after what pause."""

    reason: str
    retry_at: float
    pause_s: float


def _bytes_of(tar: OpenFile, start: int, size: int, checksum: int) -> tuple[bytes, str]:
    """Bytes of a tar, and why they are not those that were indexed; empty if they are."""
    try:
        payload = tar.read(start, size)
    except OSError as error:
        return b"", f"cannot be read ({line_of(error)})"
    if len(payload) < size:
        return payload, f"{tar.path}: was cut while it was read"
    return payload, "" if xxhash.xxh3_64_intdigest(payload) == checksum else "checksum differs from the index"


class ShardReader:
    """Reads raw samples by id. Threads may share it, and it can be sent to a process before its first use.

    Ids count the samples in use through the corpora and their manifests, shard by shard; shards are counted through
    the corpora as well.

    Args:
        corpora: what is read.
        next_use: when a tar is read next (see `cache.NextUse`); None where the order is not known.
        status: called with what is being waited for, in words.
    """

    def __init__(
        self, corpora: Sequence[Corpus], next_use: NextUse = None, status: Callable[[str], None] = lambda text: None
    ) -> None:
        self.corpora, self.next_use, self.status = list(corpora), next_use, status
        sizes = [len(corpus.manifest.shards) for corpus in corpora]
        self._corpus_of_shard = np.repeat(np.arange(len(corpora)), sizes).tolist()
        self._first_shards = np.cumsum([0, *sizes[:-1]]).tolist()
        self.shard_sizes = np.concatenate([corpus.shard_sizes() for corpus in corpora])
        self.first_ids = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._first_ids = self.first_ids.tolist()  # finding one number in a list is ten times as fast as in an array
        self._kept = KeptShards()
        self._lost: dict[int, Lost] = {}
        self._compared: set[int] = set()
        self._lock = threading.Lock()

    def begin_in_process(self, status: Callable[[str], None]) -> None:
        """Prepare for use in a forked process: its own connections, and another `status` to report to."""
        self.status = status
        for corpus in self.corpora:
            if corpus.cache is not None:
                corpus.cache.store.begin_in_process()

    def __len__(self) -> int:
        return int(self.first_ids[-1])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """The shard that holds a sample, and the sample's row in it."""
        shard = bisect_right(self._first_ids, sample_id) - 1
        corpus, number = self._corpus(shard)
        if corpus.subset is None:
            return shard, sample_id - self._first_ids[shard]
        first_shard = self._first_shards[self._corpus_of_shard[shard]]
        return shard, int(corpus.subset[sample_id - self.first_ids[first_shard]] - corpus.first_samples[number])

    def read(self, sample_id: int, frame: Callable[[int], int] | None = None) -> RawSample:
        """The bytes of one sample.

        Args:
            sample_id: which one.
            frame: of a clip: called with the number of its frames, says which one; None is the one in the middle.

        Raises:
            SampleError: the bytes are not the ones that were indexed.
            ShardLost: its shard cannot be opened, or is not the one that the manifest describes.
            InputError: its shard folder, or the store, is away.
        """
        payload, index, row = self._member(sample_id, lambda index, row: place_of_image(index, row, frame))
        return RawSample(payload, index.width.item(row), index.height.item(row))

    def sound(self, sample_id: int) -> bytes:
        """The FLAC file of a clip. Errors as of `read`; SampleError also if it has no sound."""

        def place(index: ShardIndex, row: int) -> Place:
            if index.clips is None or (found := place_of_sound(index.clips, row)).size == 0:
                raise SampleError("has no sound")
            return found

        return self._member(sample_id, place)[0]

    def _member(self, sample_id: int, place_of: Callable[[ShardIndex, int], Place]) -> tuple[bytes, ShardIndex, int]:
        """The bytes of a member of a sample, its shard's index and its row there. Errors as of `read`."""
        shard, row = self.locate(sample_id)
        for _ in range(OPEN_ATTEMPTS):
            tar, index = self._shard(shard)
            start, size, checksum = place_of(index, row)
            if start + size > tar.size:
                raise SampleError(f"ends at byte {start + size} of a tar of {tar.size}")
            payload, trouble = _bytes_of(tar, start, size, checksum)
            if not trouble:
                return payload, index, row
            self._close(shard, tar)
        raise SampleError(trouble)

    def key(self, sample_id: int) -> str:
        """The sample's WebDataset key, for people and audits."""
        shard, row = self.locate(sample_id)
        return self._known_index(shard).key(row)

    def label(self, sample_id: int) -> int:
        """The sample's class number, -1 where it has none."""
        shard, row = self.locate(sample_id)
        return int(self._known_index(shard).label[row])

    def size(self, sample_id: int) -> tuple[int, int]:
        """Width and height of a sample's image in px."""
        shard, row = self.locate(sample_id)
        index = self._known_index(shard)
        return index.width.item(row), index.height.item(row)

    def clip(self, sample_id: int) -> ClipFacts | None:
        """What is known of a clip without reading it; None for an image."""
        shard, row = self.locate(sample_id)
        clips = self._known_index(shard).clips
        return None if clips is None else facts_of(clips, row)

    def place(self, sample_id: int) -> tuple[Path, int]:
        """The tar that holds a sample, which is here, and where in it its image begins, of a clip the first one.

        Raises:
            ShardLost, InputError: as `read`.
        """
        shard, row = self.locate(sample_id)
        index = self._shard(shard)[1]
        if index.clips is not None:
            return self._entry_path(shard), index.clips.offset.item(index.clips.frames(row).start)
        return self._entry_path(shard), index.offset.item(row)

    def describe(self, sample_id: int) -> dict[str, object]:
        """Shard, key and byte offset of a sample, for the ledger of skipped ones; its row where the index is lost."""
        shard, row = self.locate(sample_id)
        corpus, number = self._corpus(shard)
        name = corpus.manifest.shards[number].name
        try:
            index = self._index(shard) if self._is_lost(shard) else self._shard(shard)[1]
        except (InputError, OSError):
            return {"shard": name, "key": f"row {row}", "offset": None}
        return {"shard": name, "key": index.key(row), "offset": int(index.offset[row])}

    def remedy(self, sample_id: int) -> str:
        """What the user can do about unreadable samples in the corpus of this sample."""
        corpus, _ = self._corpus(self.locate(sample_id)[0])
        return f"run {corpus.check}"

    def candidates(self, sample_id: int) -> Iterator[int]:
        """A sample, and those that stand in for it, one after the other, if it cannot be read: NEIGHBOURS of its shard
        from there on (cyclically), then as many from each next shard of its corpus from the same row on, then again; of
        a shard that is lost no more.
        """
        yield sample_id
        home = bisect_right(self._first_ids, sample_id) - 1
        number = self._corpus_of_shard[home]
        first_shard, num_shards = self._first_shards[number], len(self.corpora[number].manifest.shards)
        row = sample_id - self._first_ids[home]
        largest = int(self.shard_sizes[first_shard : first_shard + num_shards].max())
        for begin in range(0, largest, NEIGHBOURS):
            for distance in range(num_shards):
                shard = first_shard + (home - first_shard + distance) % num_shards
                first, size = int(self.first_ids[shard]), int(self.shard_sizes[shard])
                for step in range(begin, min(begin + NEIGHBOURS, size)):
                    if self._is_lost(shard):
                        break
                    if distance or step:
                        yield first + (row + step) % size

    def is_present(self, shard: int) -> bool:
        """Whether a shard can be read without fetching it."""
        corpus, number = self._corpus(shard)
        return corpus.cache is None or corpus.cache.has(number)

    def fetch_ahead(self, shard: int) -> bool:
        """Fetch a shard into its cache, if there is room; False if there is none before others have been read.

        Raises:
            ShardLost, InputError: as `ShardCache.get`.
        """
        return self._make_present(shard, patient=True)

    def touch(self, shard: int) -> None:
        """Tell other runs that share the cache of a shard that it is being read."""
        corpus, number = self._corpus(shard)
        if corpus.cache is not None:
            corpus.cache.touch(number)

    def take_counters(self) -> dict[str, int]:
        """Counts of the caches since the last call: hits, misses, bytes fetched, evicted shards."""
        taken = {"hits": 0, "misses": 0, "fetched_bytes": 0, "evicted": 0}
        for corpus in self.corpora:
            if corpus.cache is not None:
                for name, value in corpus.cache.counters.take().items():
                    taken[name] += value
        return taken

    def _corpus(self, shard: int) -> tuple[Corpus, int]:
        """The corpus of a shard, and the shard's number in its manifest."""
        number = self._corpus_of_shard[shard]
        return self.corpora[number], shard - self._first_shards[number]

    def _is_lost(self, shard: int) -> bool:
        """Whether a shard is lost and not yet due for a retry."""
        lost = self._lost.get(shard)
        return lost is not None and time.monotonic() < lost.retry_at

    def _shard(self, shard: int) -> tuple[OpenFile, ShardIndex]:
        with self._lock:
            if self._is_lost(shard):
                raise ShardLost(self._lost[shard].reason)
            if (kept := self._kept.get(shard)) is not None:
                return kept
            opened = self._open_or_lose(shard)
            self._kept.add(shard, *opened)
            self._close_evicted(shard)
            return opened

    def _close_evicted(self, opened: int) -> None:
        """Close what is in the cache no more, so that the disk has its room back; but not what this reader needs as
        soon as the shard that it has just opened, and would have to fetch again.
        """
        if all(corpus.cache is None for corpus in self.corpora):  # looking at each costs more than opening one
            return
        use, entry_path = self.next_use, self._entry_path(opened)
        gone = [(shard, tar) for shard, tar in self._kept.tars.items() if shard != opened and tar.is_removed()]
        for shard, tar in gone:
            if use is None or use(tar.path) > use(entry_path):
                del self._kept.tars[shard]

    def _close(self, shard: int, tar: OpenFile) -> None:
        """Close a tar with bytes that are wrong: opening it again tells whether it was cut or replaced, or its disk or
        network is away. In a cache it is compared with the manifest, once, and fetched again if it differs; other
        threads wait for that, since they would take its samples for unreadable.
        """
        corpus, number = self._corpus(shard)
        with self._lock:
            if self._kept.tars.get(shard) is not tar:
                return
            del self._kept.tars[shard]
            if corpus.cache is not None and shard not in self._compared:
                self._compared.add(shard)
                self.status(f"comparing {tar.path} with the manifest")
                if corpus.cache.drop_damaged(number, look_at_all=True):
                    _log.warning("%s: is damaged; it is fetched again", tar.path)

    def _open_or_lose(self, shard: int) -> tuple[OpenFile, ShardIndex]:
        before = self._lost.get(shard)
        try:
            opened = self._open_shard(shard, OPEN_ATTEMPTS if before is None else 1)
        except ShardLost as error:
            pause_s = _LOST_S if before is None else min(2 * before.pause_s, _LONGEST_LOST_S)
            self._lost[shard] = Lost(str(error), time.monotonic() + pause_s, pause_s)
            raise
        if before is not None:
            del self._lost[shard]
            _log.warning("%s: is back", self._entry_path(shard))
        return opened

    def _open_shard(self, shard: int, attempts: int) -> tuple[OpenFile, ShardIndex]:
        """Open a shard; a folder that is away is waited for, so that its shards do not count as lost."""
        (corpus, number), path, failed = self._corpus(shard), self._entry_path(shard), 0
        may_refetch = corpus.cache is not None
        patience = FolderPatience(corpus.manifest.root, corpus.patience_s)
        while True:
            self._make_present(shard)
            self.status(f"opening {path}")
            try:
                return self._opened(shard)
            except (OSError, ValueError) as error:
                if may_refetch and corpus.cache is not None:
                    may_refetch = False
                    if corpus.cache.drop_damaged(number):
                        _log.warning("%s: is damaged; it is fetched again", path)
                    continue  # another process may have mended it
                if isinstance(error, ShardLost):
                    raise
                why = str(error) if isinstance(error, InputError) else f"{path}: cannot be opened ({error})"
                if corpus.cache is None and patience.is_away():
                    self.status(f"waiting for {corpus.manifest.root}")
                    patience.check(why)
                else:
                    failed += 1
                    if failed == attempts:
                        raise ShardLost(
                            f"{why}, after {failed} attempts; restore it, then run {corpus.check}"
                        ) from error
            patience.pause()

    def _opened(self, shard: int) -> tuple[OpenFile, ShardIndex]:
        corpus, number = self._corpus(shard)
        entry, path = corpus.manifest.shards[number], corpus.manifest.tar_path(number)
        tar = OpenFile(path)
        if tar.size != entry.num_bytes:
            raise ShardLost(
                f"{path}: is {tar.size:,} bytes, the manifest says {entry.num_bytes:,}: it was truncated "
                f"or replaced; restore it, then run {corpus.check}"
            )
        index = self._kept.indexes.get(shard)
        return tar, self._index(shard) if index is None else index

    def _known_index(self, shard: int) -> ShardIndex:
        """The index of a shard, also if the shard was evicted or lost after its sample had been read."""
        with self._lock:
            if shard in self._kept.indexes:
                return self._kept.indexes[shard]
        try:
            return self._shard(shard)[1]
        except ShardLost as lost:
            try:
                return self._index(shard)
            except ShardLost:
                raise
            except InputError:  # it never came from its store, or has gone with its tar
                raise lost from None

    def _entry_path(self, shard: int) -> Path:
        corpus, number = self._corpus(shard)
        return corpus.manifest.tar_path(number)

    def _index(self, shard: int) -> ShardIndex:
        """The index of a shard. ShardLost: it is not the one that the manifest describes."""
        corpus, number = self._corpus(shard)
        entry, path = corpus.manifest.shards[number], corpus.manifest.index_path(number)
        index = read_index(path)
        if len(index) != entry.num_samples:
            what = f"lists {len(index)} samples, the manifest says {entry.num_samples}"
        elif entry.index_checksum and file_checksum(path) != entry.index_checksum:
            what = "is not the index named in the manifest: it was replaced, perhaps with its tar"
        else:
            return index
        mend = how_to_mend(corpus.manifest.root) if corpus.cache is None else corpus.check
        raise ShardLost(f"{path}: {what}; restore both, or run {mend}")

    def _make_present(self, shard: int, *, patient: bool = False) -> bool:
        corpus, number = self._corpus(shard)
        if corpus.cache is None:
            return True
        present = corpus.cache.get(number, self.next_use, self.status, patient=patient)
        corpus.cache.touch(number)
        return present
