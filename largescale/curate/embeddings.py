"""A folder of features, read block by block: what `largescale features` wrote, Parquet or .npy.

Images are known by their sample number in the shard folder that the features are of, as `data.subset` takes it. It
follows from the numbers of samples in the shards, which each file's metadata has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from torch import Tensor

from largescale.evaluate import feature_files
from largescale.evaluate.made_from import difference
from shards.format.manifest import MANIFEST_NAME, Manifest
from shards.ground.errors import InputError

_BLOCK = 8192
_ALIKE = ("layer", "transform", "network", "weights", "projection", "dtype", "format", "num_features")
"""Entries of the metadata that must be the same for embeddings to be compared."""


@dataclass(frozen=True)
class FeatureFile:
    """Features of one shard.

    Attributes:
        path: the Parquet.
        first_sample: number of the shard's first sample.
        num_samples: of the shard.
        num_images: that have features.
        about: the metadata.
    """

    path: Path
    first_sample: int
    num_samples: int
    num_images: int
    about: dict[str, Any]

    @property
    def is_npy(self) -> bool:
        """Whether embeddings are in a .npy beside the Parquet."""
        return bool(self.about["format"] == "npy")

    def samples(self) -> np.ndarray:
        """Numbers of the images, int64 [num_images]."""
        return feature_files.rows_of(self.path).astype(np.int64) + self.first_sample

    def blocks(self) -> Iterator[np.ndarray]:
        """Embeddings as they are stored, [n, D], some thousand at a time; always the same blocks.

        Raises:
            InputError: they are damaged, or not finite.
        """
        try:
            for block in self._blocks():
                if not np.isfinite(block).all():
                    raise InputError(f"{self.path}: holds embeddings that are not finite; write these features again")
                yield block
        except (OSError, pa.ArrowException, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path}: cannot be read ({' '.join(str(error).split())[:200]})") from error

    def _blocks(self) -> Iterator[np.ndarray]:
        width = self.about["num_features"]
        if self.is_npy:
            whole = np.load(self.path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            for start in range(0, len(whole), _BLOCK):
                yield np.array(whole[start : start + _BLOCK])
            return
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BLOCK, columns=["embedding"]):
                yield batch.column(0).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


@dataclass(frozen=True)
class Embeddings:
    """All features of a folder.

    Attributes:
        files: in the order of the shards.
        width: numbers of an embedding.
        dtype: that they are stored in.
    """

    files: tuple[FeatureFile, ...]
    width: int
    dtype: np.dtype[Any]

    @property
    def num_images(self) -> int:
        """That have features."""
        return sum(file.num_images for file in self.files)

    def fingerprint(self) -> str:
        """Identifies the embeddings, by what they were made from; not what else is in the files, such as pictures."""
        made = [{key: file.about.get(key) for key in _ALIKE} for file in self.files[:1]]
        each = [[file.path.name, file.about["shard"]["tar"], file.num_samples, file.num_images] for file in self.files]
        text = json.dumps([made, each], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())


def unit_rows(block: np.ndarray, device: torch.device | None = None) -> Tensor:
    """Rows of length 1, float32 [n, D]; rows of zeros stay zeros."""
    rows = torch.from_numpy(block.astype(np.float32)).to(device or "cpu")
    for some in rows.split(_BLOCK):
        some.div_(some.double().square().sum(1, keepdim=True).sqrt().clamp_min(1e-30).float())
    return rows


def read_embeddings(folder: Path, manifest: Manifest | None = None) -> Embeddings:
    """What a folder holds; embeddings are not read.

    Args:
        folder: of `largescale features`.
        manifest: of the shards that they are of, to be compared with; None goes by the files' names.

    Raises:
        InputError: no features, features that cannot be compared, of several shard folders, or of other shards.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; write features with `largescale features RUN SHARDS {folder}`")
    if (folder / MANIFEST_NAME).is_file():
        raise InputError(
            f"{folder}: holds shards, not features; write them with `largescale features RUN {folder} FEATURES`, and "
            f"pass FEATURES"
        )
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise InputError(f"{folder}: holds no features; write some with `largescale features RUN SHARDS {folder}`")
    abouts = {path.stem: feature_files.about(path) for path in paths}
    names = list(abouts)
    for name in names[1:]:
        one, other = ({key: abouts[each].get(key) for key in _ALIKE} for each in (names[0], name))
        if why := difference(one, other):
            raise InputError(f"{folder}: features differ between {names[0]} and {name}: {why}; write them again")
    if not abouts[names[0]]["num_features"]:
        raise InputError(
            f"{folder}: holds assignments, not features; write features with `largescale features RUN SHARDS "
            f"FEATURES`, and pass FEATURES"
        )
    names = _of_manifest(folder, names, abouts, manifest) if manifest else _of_names(folder, names, abouts)
    files, first = [], 0
    for name in names:
        about = abouts[name]
        files.append(
            FeatureFile(folder / f"{name}.parquet", first, about["shard"]["samples"], about["num_images"], about)
        )
        first += about["shard"]["samples"]
    found = Embeddings(
        tuple(files), int(abouts[names[0]]["num_features"]), np.dtype(feature_files.DTYPES[abouts[names[0]]["dtype"]])
    )
    if not found.num_images:
        raise InputError(f"{folder}: holds features of no image; write them again")
    return found


def _of_manifest(folder: Path, names: list[str], abouts: dict[str, dict[str, Any]], manifest: Manifest) -> list[str]:
    expected = [entry.name.removesuffix(".tar") for entry in manifest.shards]
    if missing := sorted(set(expected) - set(names)):
        raise InputError(
            f"{folder}: has no features of {missing[0]}.tar of {manifest.root}; run `largescale features` again, "
            f"or pass the --shards that they are of"
        )
    if others := sorted(set(names) - set(expected)):
        raise InputError(f"{folder}: {others[0]}.parquet is of none of the shards in {manifest.root}; remove it")
    for name, entry in zip(expected, manifest.shards, strict=True):
        if abouts[name]["shard"]["tar"] != entry.checksum or abouts[name]["shard"]["samples"] != entry.num_samples:
            raise InputError(
                f"{folder}: {name}.parquet was made of another {entry.name} than that in {manifest.root}; run "
                f"`largescale features` again, or pass the --shards that they are of"
            )
    return expected


def _of_names(folder: Path, names: list[str], abouts: dict[str, dict[str, Any]]) -> list[str]:
    """Shards of one folder are numbered without gaps; nothing else tells their order."""
    remedy = "pass --shards, whose manifest tells which files there are and in which order"
    numbered = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    stems = {found.group(1) if found else name for found, name in zip(numbered, names, strict=True)}
    if len(stems) > 1:
        raise InputError(
            f"{folder}: holds features of several shard folders ({', '.join(sorted(stems)[:2])}); write those of each "
            f"to a folder of its own, or {remedy}"
        )
    numbers = [int(found.group(2)) for found in numbered if found]
    if numbers != list(range(len(names))) and (numbers or len(names) > 1):
        gap = next(place for place in range(len(names)) if place >= len(numbers) or numbers[place] != place)
        raise InputError(
            f"{folder}: has no features of shard number {gap}; run `largescale features` again, or {remedy}"
        )
    num_shards = max(about.get("num_shards", 0) for about in abouts.values())  # files of version 1 may not say it
    if len(names) < num_shards:
        raise InputError(
            f"{folder}: has features of {len(names):,} of {num_shards:,} shards; run `largescale features` again"
        )
    return names
