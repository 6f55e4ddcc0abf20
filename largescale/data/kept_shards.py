"""What a reader keeps of the shards that it has read last: tars that are open, and indexes."""

from __future__ import annotations

import resource
from collections import OrderedDict

from shards.format.shard_index import ShardIndex
from shards.ground.open_file import OpenFile

LEAST_KEPT = 64
"""Tars, and indexes, that are kept in any case."""

_MOST_TARS, _SHARE_OF_DESCRIPTORS = 1024, 8
"""Tars that a reader keeps open at most, and of a process's descriptors one in so many: there may be more readers."""

_MOST_IMAGES = LEAST_KEPT * 10_000
"""Images that all indexes tell of, frames of clips among them: some 40 MB."""


class KeptShards:
    """Open tars and indexes by number of shard; those used longest ago are dropped. Windows over small shards need many
    at a time: a tar that is opened again is cheap, an index that is read again is not.
    """

    def __init__(self) -> None:
        self.tars: OrderedDict[int, OpenFile] = OrderedDict()
        self.indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._num_images = 0
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_tars = max(LEAST_KEPT, min(_MOST_TARS, limit // _SHARE_OF_DESCRIPTORS))

    def get(self, shard: int) -> tuple[OpenFile, ShardIndex] | None:
        """The tar and the index of a shard, if both are here."""
        if shard not in self.tars or shard not in self.indexes:
            return None
        self.tars.move_to_end(shard)
        self.indexes.move_to_end(shard)
        return self.tars[shard], self.indexes[shard]

    def add(self, shard: int, tar: OpenFile, index: ShardIndex) -> None:
        """Keep the tar and the index of a shard, and drop what is too much; a tar closes once no reader uses it."""
        before = self.indexes.get(shard)
        self._num_images += index.num_images() - (before.num_images() if before else 0)
        self.tars[shard], self.indexes[shard] = tar, index
        self.tars.move_to_end(shard)
        self.indexes.move_to_end(shard)
        if len(self.tars) > self._most_tars:
            self.tars.popitem(last=False)
        while len(self.indexes) > LEAST_KEPT and self._num_images > _MOST_IMAGES:
            self._num_images -= self.indexes.popitem(last=False)[1].num_images()
