"""A shard folder as a sequence of samples, for programs that look at images; training has a reader of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import xxhash

from shards.format.manifest import Manifest, ShardEntry, check_files
from shards.format.shard_index import ShardIndex, index_path, read_index
from shards.ground.errors import InputError
from shards.ground.open_file import OpenFile
from shards.images.names import IMAGE_FORMATS
from shards.stores.locate import fetched, manifest_at
from shards.stores.store import Missing, Store, is_url

_FETCHED_AT_ONCE = 32


@dataclass(frozen=True)
class Sample:
    """One image, as it is stored.

    Attributes:
        key: its WebDataset key.
        image: the bytes of its file.
        format: one of IMAGE_FORMATS, such as "jpeg".
        width, height: in pixels, as its header says.
        label: position in the manifest's classes; None without a label.
    """

    key: str
    image: bytes
    format: str
    width: int
    height: int
    label: int | None


class ShardFolder(Sequence[Sample]):
    """The samples of a shard folder in the order in which they are stored.

    From a store, going through them fetches shard after shard; asking for one reads its bytes alone.

    Args:
        location: path or URL of the folder.

    Attributes:
        location: as text.
        manifest: what the folder holds; `manifest.classes` names the labels.

    Raises:
        InputError: no finished shard folder, or files that are not as its manifest says; later, a sample whose bytes
            are not those that were written.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.manifest: Manifest = manifest_at(self.location)
        if not is_url(self.location):
            check_files(self.manifest)
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self._last: tuple[int, ShardIndex] | None = None

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.manifest.shards:
            with fetched(self.location, [shard.name, index_path(Path(shard.name)).name]) as folder:
                if not (folder / shard.name).is_file():
                    raise InputError(f"{self.location}/{shard.name}: missing; restore it, or convert again")
                index, tar = read_index(index_path(folder / shard.name)), OpenFile(folder / shard.name)
                for row in range(len(index)):
                    payload = tar.read(index.offset.item(row), index.size.item(row))
                    yield self._sample(shard, index, row, payload)

    @overload
    def __getitem__(self, number: int) -> Sample: ...

    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...

    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number %= len(self)
        place = int(np.searchsorted(self._ends, number, side="right"))
        shard, index = self.manifest.shards[place], self._index(place)
        row = number - int(self._ends[place]) + shard.num_samples
        start, size = index.offset.item(row), index.size.item(row)
        if is_url(self.location):
            try:
                payload = Store(self.location).read_range(shard.name, start, start + size)
            except Missing as error:  # or torn
                raise InputError(f"{error}; restore it, or convert again") from error
        else:
            payload = OpenFile(self.manifest.tar_path(place)).read(start, size)
        return self._sample(shard, index, row, payload)

    def indexes(self) -> Iterator[ShardIndex]:
        """The index of each shard."""
        names = [index_path(Path(shard.name)).name for shard in self.manifest.shards]
        for start in range(0, len(names), _FETCHED_AT_ONCE):
            some = names[start : start + _FETCHED_AT_ONCE]
            with fetched(self.location, some) as folder:
                yield from (read_index(folder / name) for name in some)

    def _index(self, place: int) -> ShardIndex:
        if self._last is None or self._last[0] != place:
            name = index_path(Path(self.manifest.shards[place].name)).name
            with fetched(self.location, [name]) as folder:
                self._last = place, read_index(folder / name)
        return self._last[1]

    def _sample(self, shard: ShardEntry, index: ShardIndex, row: int, payload: bytes) -> Sample:
        if xxhash.xxh3_64_intdigest(payload) != index.checksum.item(row):
            raise InputError(
                f"{self.location}/{shard.name}: {index.key(row)} is damaged; run `shards verify {self.location}`"
            )
        label = index.label.item(row)
        return Sample(
            index.key(row),
            payload,
            IMAGE_FORMATS[index.format.item(row)],
            index.width.item(row),
            index.height.item(row),
            label if label >= 0 else None,
        )
