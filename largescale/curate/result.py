"""What a curation leaves: the subset, a table of all images, and counts.

subset.npy             sample numbers, sorted, int64: `data.subset` takes them as they are
repeats.npy            with --repeat: how often each of them is to be taken
images/NAME.parquet    key, shard, row, sample, coarse, cluster_1, ..., kept, duplicate_of, cosine of each image
curation.json          settings, counts, times; written last
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from largescale.curate.buckets import own_files
from largescale.curate.embeddings import Embeddings, FeatureFile
from largescale.curate.examples import Examples
from largescale.curate.stages import BucketImages, Pile
from largescale.distributed.collectives import rows_on_rank_0
from largescale.processes import on_rank_0, rank, together
from shards.ground.files import atomic_write


@dataclass(frozen=True)
class LevelSizes:
    """Images in each cluster of a level.

    Attributes:
        name: `cluster_1` and so on, as in the table; `coarse` without levels.
        before: all images, int64 [K].
        unique: without duplicates.
        after: that are taken.
    """

    name: str
    before: np.ndarray
    unique: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What was found, on all ranks; `examples` on rank 0 only.

    Attributes:
        num_taken: different images in the subset.
        num_available: that it could be taken from: no duplicates, and not of clusters that give nothing.
        levels: from the lowest to the top.
        examples: for pictures.
    """

    num_taken: int
    num_available: int
    levels: tuple[LevelSizes, ...]
    examples: Examples | None


def write_images(pile: Pile, embeddings: Embeddings, folder: Path) -> Outcome:
    """Write the subset and the table; each rank writes that of its files.

    Every rank reads what was found of all images once, bucket by bucket, and keeps what is of its own files.

    Raises:
        InputError: on all ranks, if one of them cannot read or write.

    Collectives: every rank must call it; those of `together` and `rows_on_rank_0`.
    """
    files = own_files(embeddings)
    start = files[0].first_sample if files else 0
    stop = files[-1].first_sample + files[-1].num_samples if files else 0
    own = _Own(start, stop)
    sizes = np.zeros((3, pile.num_lowest), np.int64)
    examples = Examples(pile.wish.seed, pile.parents) if rank() == 0 else None

    def work() -> None:
        for bucket in range(pile.buckets.count):
            found = pile.images_of(bucket)
            for row, counted in zip(sizes, (found.times >= 0, found.duplicate_of < 0, found.times > 0), strict=True):
                np.add.at(row, found.clusters, counted)
            if examples is not None:
                examples.add(found)
            own.take(bucket, found)
        for file in files:
            _write_table(file, own, pile, folder / "images" / file.path.name)

    together(work)
    chosen = np.flatnonzero(own.times)
    subset = rows_on_rank_0(torch.from_numpy(chosen + start))
    times = rows_on_rank_0(torch.from_numpy(own.times[chosen].astype(np.int64)))

    def save() -> None:
        assert subset is not None and times is not None
        _save(folder / "subset.npy", subset.numpy())
        if pile.wish.repeat > 1:
            _save(folder / "repeats.npy", times.numpy())

    on_rank_0(save)
    levels = tuple(_levels(sizes, pile))
    return Outcome(int(sizes[2].sum()), pile.available, levels, examples)


def _levels(sizes: np.ndarray, pile: Pile) -> list[LevelSizes]:
    if not pile.wish.levels:
        return [LevelSizes("coarse", *sizes)]
    found = [LevelSizes("cluster_1", *sizes)]
    for number, above in enumerate(pile.parents, 2):
        count = pile.wish.levels[number - 1]
        sizes = np.stack([np.bincount(above, row, minlength=count).astype(np.int64) for row in sizes])
        found.append(LevelSizes(f"cluster_{number}", *sizes))
    return found


class _Own:
    """What was found of samples `start` to `stop`."""

    def __init__(self, start: int, stop: int) -> None:
        num = stop - start
        self.start, self.stop = start, stop
        self.coarse, self.clusters = np.full(num, -1, np.int32), np.full(num, -1, np.int64)
        self.duplicate_of, self.cosines = np.full(num, -1, np.int64), np.zeros(num, np.float32)
        self.times = np.zeros(num, np.int32)

    def take(self, bucket: int, found: BucketImages) -> None:
        first, last = np.searchsorted(found.samples, (self.start, self.stop))
        at = found.samples[first:last] - self.start
        self.coarse[at] = bucket
        self.clusters[at] = found.clusters[first:last]
        self.duplicate_of[at], self.cosines[at] = found.duplicate_of[first:last], found.cosines[first:last]
        self.times[at] = found.times[first:last]


def _write_table(file: FeatureFile, own: _Own, pile: Pile, path: Path) -> None:
    table = pq.read_table(file.path, columns=["key", "shard", "row"])
    samples = file.samples()
    at = samples - own.start
    columns = {name: table[name] for name in table.column_names}
    columns |= {"sample": pa.array(samples), "coarse": pa.array(own.coarse[at])}
    if pile.wish.levels:
        clusters = own.clusters[at]
        columns["cluster_1"] = pa.array(clusters)
        for number, above in enumerate(pile.parents, 2):
            clusters = above[clusters]
            columns[f"cluster_{number}"] = pa.array(clusters)
    unique = own.duplicate_of[at] < 0
    columns["kept"] = pa.array(own.times[at] > 0)
    if pile.wish.repeat > 1:
        columns["times"] = pa.array(own.times[at])
    columns["duplicate_of"] = pa.array(own.duplicate_of[at], mask=unique)
    columns["cosine"] = pa.array(own.cosines[at], mask=unique)
    with atomic_write(path) as out:
        pq.write_table(pa.table(columns), out, compression="zstd", write_page_checksum=True)


def _save(path: Path, numbers: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, numbers, allow_pickle=False)
