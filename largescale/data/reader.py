"""Random access to the samples of a shard folder: by id, through the index, from memory-mapped tars."""

from __future__ import annotations

import mmap
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import xxhash

from shards.errors import InputError
from shards.manifest import Manifest, ShardIndex, read_index

OPEN_SHARDS = 64
"""Tars that a reader keeps mapped; the least recently used one is closed beyond that."""

OPEN_ATTEMPTS = 3


class SampleError(Exception):
    """One sample cannot be used; the reason is its message. The stream counts it and takes a substitute."""


@dataclass(frozen=True)
class RawSample:
    """The stored bytes of one image."""

    payload: memoryview
    width: int
    height: int


class ShardReader:
    """Reads raw samples of a manifest by id.

    Ids count samples through the manifest, shard by shard. Not shared between threads or processes: mappings are
    opened on first use, so a reader can be sent to a loader process.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.first_ids = np.concatenate([[0], np.cumsum([shard.num_samples for shard in manifest.shards])])
        self._open: OrderedDict[int, tuple[mmap.mmap, ShardIndex]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.first_ids[-1])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """The shard that holds a sample, and the sample's row in it."""
        shard = int(np.searchsorted(self.first_ids, sample_id, side="right")) - 1
        return shard, int(sample_id - self.first_ids[shard])

    def read(self, sample_id: int) -> RawSample:
        """The bytes of one sample.

        Raises:
            SampleError: the bytes are not the ones that were indexed.
            InputError: the shard cannot be opened, or is not the one that the manifest describes.
        """
        shard, row = self.locate(sample_id)
        tar, index = self._shard(shard)
        start, size = int(index.offset[row]), int(index.size[row])
        if start + size > len(tar):
            raise SampleError(f"ends at byte {start + size} of a tar of {len(tar)}")
        payload = memoryview(tar)[start : start + size]
        if xxhash.xxh3_64_intdigest(payload) != int(index.checksum[row]):
            raise SampleError("checksum differs from the index")
        return RawSample(payload, int(index.width[row]), int(index.height[row]))

    def key(self, sample_id: int) -> str:
        """The sample's WebDataset key, for people and audits."""
        shard, row = self.locate(sample_id)
        return self._shard(shard)[1].key(row)

    def label(self, sample_id: int) -> int:
        """The sample's class number, -1 where it has none."""
        shard, row = self.locate(sample_id)
        return int(self._shard(shard)[1].label[row])

    def describe(self, sample_id: int) -> dict[str, object]:
        """Shard, key and byte offset of a sample, for the ledger of skipped ones."""
        shard, row = self.locate(sample_id)
        index = self._shard(shard)[1]
        return {"shard": self.manifest.shards[shard].name, "key": index.key(row), "offset": int(index.offset[row])}

    def substitute(self, sample_id: int, attempt: int) -> int:
        """The sample that stands in for an unreadable one: the `attempt`-th next in its shard, cyclically."""
        shard, row = self.locate(sample_id)
        return int(self.first_ids[shard]) + (row + attempt) % self.manifest.shards[shard].num_samples

    def _shard(self, shard: int) -> tuple[mmap.mmap, ShardIndex]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        opened = self._open_shard(shard)
        self._open[shard] = opened
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)  # its mapping closes with the last view of it
        return opened

    def _open_shard(self, shard: int) -> tuple[mmap.mmap, ShardIndex]:
        entry, path = self.manifest.shards[shard], self.manifest.tar_path(shard)
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                with path.open("rb") as file:
                    tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                break
            except (OSError, ValueError) as error:
                if attempt == OPEN_ATTEMPTS:
                    raise InputError(
                        f"{path}: cannot be opened after {attempt} attempts ({error}); "
                        f"restore it or convert again, then run `shards verify {self.manifest.root}`"
                    ) from error
                time.sleep(0.2 * 2**attempt)
        index = read_index(self.manifest.index_path(shard))
        if len(index.offset) != entry.num_samples:
            raise InputError(
                f"{self.manifest.index_path(shard)}: lists {len(index.offset)} samples, the manifest says "
                f"{entry.num_samples}; run `shards index {self.manifest.root}`"
            )
        return tar, index
