"""What a stream reads: one shard folder or several mixed by weights, here or in a store, whole or in part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from largescale.config import DataConfig, corpus_settings
from largescale.data.cache import ShardCache, default_folder, open_cache
from shards.format.manifest import MANIFEST_NAME, Manifest, check_files, parse_manifest, read_manifest
from shards.format.shard_index import ShardIndex, read_index
from shards.ground.errors import InputError
from shards.stores.locate import manifest_bytes
from shards.stores.store import Store, is_url

START_PATIENCE_S = 60.0
"""Patience with a store at the start: shorter than later on, since the user is probably still watching."""

NUMBERS_MARK = "# numbers"
"""First line of a text subset file whose lines are sample numbers; without it they are keys."""


@dataclass(frozen=True)
class Corpus:
    """One shard folder.

    Attributes:
        manifest: what it holds.
        weight: its share of a batch, relative to the others.
        subset: the samples that are used, sorted numbers within the manifest, int64; None uses all.
        cache: the local copies, if the folder is in a store.
        patience_s: how long to wait for a folder that is away; a store has its own patience.
    """

    manifest: Manifest
    weight: float = 1.0
    subset: np.ndarray | None = None
    cache: ShardCache | None = None
    patience_s: float = 0.0

    @property
    def where(self) -> str:
        """The folder, or the store's URL, as the user knows it."""
        return str(self.manifest.root) if self.cache is None else self.cache.store.url

    @property
    def check(self) -> str:
        """The command, for people, that finds what is wrong with the files."""
        if self.cache is None:
            return f"`shards verify {self.where}`"
        return f"`shards verify` on the folder that {self.where} was uploaded from"

    @cached_property
    def first_samples(self) -> np.ndarray:
        """The number of the first sample of each shard, and of all samples: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.manifest.shards], dtype=np.int64)])

    def shard_sizes(self) -> np.ndarray:
        """Samples in use of each shard, int64."""
        first = self.first_samples
        return np.diff(first if self.subset is None else np.searchsorted(self.subset, first))

    def fingerprint(self) -> str:
        """Identifies the samples in use and their order."""
        if self.subset is None:
            return self.manifest.fingerprint
        return f"{self.manifest.fingerprint}/{xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.subset).data)}"

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; its tar need not be here.

        Raises:
            InputError: it is missing or damaged, or the store is away.
        """
        return read_index(self.manifest.index_path(shard)) if self.cache is None else self.cache.read_index(shard)

    def check_files(self, part: int = 0, parts: int = 1) -> None:
        """Check that a part of the shards is there and whole; shards in a store are checked when they arrive.

        Raises:
            InputError: naming the first file that is not as the manifest says.
        """
        if self.cache is None:
            check_files(self.manifest, part, parts)


def open_corpora(data: DataConfig) -> list[Corpus]:
    """The corpora that `data.shards` names.

    Raises:
        InputError: a folder, store or subset file that cannot be used.
    """
    corpora = []
    for location, weight, subset in corpus_settings(data):
        corpus = open_corpus(location, data)
        chosen = read_subset(subset, corpus) if subset else None
        corpora.append(replace(corpus, weight=weight, subset=chosen))
    return corpora


def open_corpus(location: str, data: DataConfig) -> Corpus:
    """A whole shard folder, here or in a store.

    Raises:
        InputError: it cannot be read, or the cache of a store cannot be used.
    """
    if not is_url(location):
        return Corpus(read_manifest(location), patience_s=data.store_patience_s)
    store = Store(location, patience_s=min(START_PATIENCE_S, data.store_patience_s), stall_s=data.store_stall_s)
    manifest = parse_manifest(manifest_bytes(store), Path(), where=f"{location}/{MANIFEST_NAME}")
    store.patience_s = data.store_patience_s
    folder = Path(data.cache) if data.cache else default_folder()
    cache = open_cache(store, manifest, folder, data.cache_gb)
    return Corpus(cache.manifest, cache=cache)


def fingerprint(corpora: list[Corpus]) -> str:
    """Identifies what a run is trained on; for a single whole folder, its manifest's fingerprint."""
    if len(corpora) == 1:
        return corpora[0].fingerprint()
    least = min(corpus.weight for corpus in corpora)  # only the ratio of weights counts: 2 to 2 is 1 to 1
    text = "\n".join(f"{corpus.fingerprint()} {round(corpus.weight / least, 9)}" for corpus in corpora)
    return xxhash.xxh3_128_hexdigest(text.encode())


def read_subset(path: str, corpus: Corpus) -> np.ndarray:
    """The samples that a subset file lists.

    Args:
        path: `.npy` with sample numbers (kept on disk, so that any number costs no memory), or a text file of a
            WebDataset key per line, or a sample number per line if its first line is `# numbers`. Nothing is guessed:
            keys may be all digits (those of img2dataset and COCO are), and sample 139 is not the one of key 139. Keys
            are looked up in every index: with many shards use numbers.

    Returns:
        int64, sorted, each once.

    Raises:
        InputError: not readable, empty, or a sample that the corpus does not have.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such subset file; expected a .npy of sample numbers, or one key per line")
    numbers = _numbers_of_array(path) if path.endswith(".npy") else _numbers_of_lines(path, corpus)
    if len(numbers) == 0:
        raise InputError(f"{path}: lists no samples")
    total = corpus.manifest.num_samples
    if numbers[0] < 0 or numbers[-1] >= total:
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise InputError(f"{path}: lists sample {wrong}, the corpus {corpus.manifest.name} has 0 to {total - 1}")
    return numbers if numbers.dtype == np.int64 else numbers.astype(np.int64)


def _numbers_of_array(path: str) -> np.ndarray:
    expected = "expected a one-dimensional .npy of integers, ideally int64 and sorted"
    try:
        numbers = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = "it holds Python objects" if "pickle" in str(error) else str(error)
        raise InputError(f"{path}: not a .npy array ({why}); {expected}") from error
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        found = f"{numbers.dtype} of shape {numbers.shape}" if isinstance(numbers, np.ndarray) else "several arrays"
        raise InputError(f"{path}: {expected}, not {found}")
    if numbers.dtype == np.int64 and _rising(numbers):
        return numbers
    return np.unique(numbers)


def _rising(numbers: np.ndarray, block: int = 2**22) -> bool:
    """Whether every number is larger than the one before, checked block by block."""
    return all((np.diff(numbers[start : start + block + 1]) > 0).all() for start in range(0, len(numbers), block))


def _numbers_of_lines(path: str, corpus: Corpus) -> np.ndarray:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file ({error}); expected one key per line, or .npy") from error
    if lines and lines[0] == NUMBERS_MARK:
        return np.array(
            sorted({_number(path, place, line) for place, line in enumerate(lines, 1) if line and place > 1}), object
        )
    return _numbers_of_keys(path, {line for line in lines if line}, corpus)


def _number(path: str, place: int, line: str) -> int:
    try:
        return int(line)
    except ValueError as error:
        raise InputError(
            f"{path}:{place}: {line[:80]!r} is not a sample number, but the first line is "
            f"{NUMBERS_MARK!r}; remove that line if this is a file of keys"
        ) from error


def _numbers_of_keys(path: str, wanted: set[str], corpus: Corpus) -> np.ndarray:
    name, found, first = corpus.manifest.name, [], 0
    tar_of: dict[str, str] = {}
    for shard, entry in enumerate(corpus.manifest.shards):
        index = corpus.index(shard)
        hits = [row for row in range(len(index)) if index.key(row) in wanted]
        for key in sorted({index.key(row) for row in hits}):
            if key in tar_of:
                raise InputError(
                    f"{path}: key {key} is in {tar_of[key]} and in {entry.name} of {name}; list sample numbers "
                    f"instead, below a first line {NUMBERS_MARK!r}"
                )
            tar_of[key] = entry.name
        found += [first + row for row in hits]
        first += entry.num_samples
    if missing := wanted - tar_of.keys():
        digits = all(key.removeprefix("-").isdecimal() for key in missing)
        hint = f"; if these are sample numbers, make the first line {NUMBERS_MARK!r}" if digits else ""
        raise InputError(f"{path}: {len(missing)} keys are not in {name}, such as {min(missing)}{hint}")
    return np.array(found, np.int64)


def shares_of_batch(corpora: list[Corpus], stream_counts: list[int]) -> list[dict[str, Any]]:
    """Name, samples and share of a batch of each corpus, for people."""
    streams = sum(stream_counts)
    return [
        {"name": corpus.manifest.name, "samples": int(corpus.shard_sizes().sum()), "share": count / streams}
        for corpus, count in zip(corpora, stream_counts, strict=True)
    ]
