"""`shards verify`: is every byte still what was converted, and does every image decode?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash
from tqdm import tqdm

from shards.errors import InputError
from shards.images import ImageError, inspect
from shards.manifest import Manifest, ShardEntry, index_path, read_index
from shards.remote import fetched, manifest_at, names_at, process_context
from shards.tar import file_checksum, map_file, walk


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the manifest says."""

    shard: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key + ': ' if self.key else ''}{self.what}"


def verify(location: str | Path, *, workers: int, decode: bool) -> tuple[Manifest, list[Problem]]:
    """Compare a shard folder with its manifest: sizes, checksums, counts, index, and with `decode` every image.

    Raises:
        InputError: no readable manifest.
    """
    location = str(location)
    manifest = manifest_at(location)
    check = partial(_verify_shard, location, decode)
    with ProcessPoolExecutor(min(workers, max(1, len(manifest.shards))), process_context(location)) as pool:
        found = list(tqdm(pool.map(check, manifest.shards), total=len(manifest.shards), unit="shard",
                          desc="verify", leave=False))
    listed = {shard.name for shard in manifest.shards}
    strangers = [Problem(name, "", "not in the manifest") for name in names_at(location)
                 if name.endswith(".tar") and name not in listed]
    return manifest, [problem for problems in found for problem in problems] + strangers


def _verify_shard(location: str, decode: bool, shard: ShardEntry) -> list[Problem]:
    with fetched(location, [shard.name, index_path(Path(shard.name)).name]) as folder:
        return [Problem(shard.name, key, what) for key, what in _problems(folder / shard.name, shard, decode)]


def _problems(tar: Path, shard: ShardEntry, decode: bool) -> Iterator[tuple[str, str]]:
    if not tar.is_file():
        yield "", "missing"
        return
    size = tar.stat().st_size
    if size != shard.num_bytes:
        yield "", f"{size:,} bytes, the manifest says {shard.num_bytes:,}"
    elif file_checksum(tar) != shard.checksum:
        yield "", "checksum of the file differs from the manifest"
    try:
        index = read_index(index_path(tar))
    except InputError as error:
        yield "", str(error)
        return
    if shard.index_checksum and file_checksum(index_path(tar)) != shard.index_checksum:
        yield "", "checksum of its index differs from the manifest"
    if len(index) != shard.num_samples:
        yield "", f"its index lists {len(index)} samples, the manifest says {shard.num_samples}"
    try:
        with tar.open("rb") as file, map_file(file, tar) as stored:
            for row in range(len(index)):
                start, size = index.offset.item(row), index.size.item(row)
                with memoryview(stored)[start : start + size] as payload:
                    if xxhash.xxh3_64_intdigest(payload) != index.checksum.item(row):
                        yield index.key(row), "bytes of the image differ from the index"
                    elif decode:
                        pixels = index.width.item(row) * index.height.item(row)
                        yield from _undecodable(index.key(row), bytes(payload), pixels)
            found = {sample.key: sample.image() for sample in walk(file, tar)}
        for row in range(len(index)):
            if found.get(index.key(row)) != (index.offset.item(row), index.size.item(row)):
                yield index.key(row), "the tar's headers do not lead to it"
    except InputError as error:
        yield "", str(error).removeprefix(f"{tar}: ")


def _undecodable(key: str, payload: bytes, pixels: int) -> Iterator[tuple[str, str]]:
    try:
        inspect(payload, decode=True, max_pixels=pixels)
    except ImageError as error:
        yield key, str(error)
