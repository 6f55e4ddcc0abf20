"""The index beside a tar: where each of its samples is and what is known of it, one column per attribute."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, load_file, save

from shards.format.clip_index import ClipColumns, clips_in
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

INDEX_SUFFIX = ".index.safetensors"

_COLUMNS = {
    "offset": np.uint64,
    "size": np.uint64,
    "width": np.uint32,
    "height": np.uint32,
    "format": np.uint8,
    "checksum": np.uint64,
    "label": np.int32,
}


def index_path(tar: Path) -> Path:
    """Where the index of a tar is."""
    return tar.with_name(tar.name.removesuffix(".tar") + INDEX_SUFFIX)


class KeyColumn(Protocol):
    """What an index needs of its keys: a list or tuple of them, or keys read from a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> str: ...


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, one column per attribute.

    Attributes:
        keys: WebDataset keys.
        offset, size: of the image's bytes in the tar, uint64 [N].
        width, height: in pixels, from the image's header, uint32 [N].
        format: position in IMAGE_FORMATS, uint8 [N].
        checksum: xxh3-64 of the image's bytes, uint64 [N].
        label: position in the manifest's classes, -1 for none, int32 [N].
        clips: where the samples are clips: their frames and sounds. The columns above then tell of the middle frame.
    """

    keys: KeyColumn
    offset: np.ndarray
    size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    format: np.ndarray
    checksum: np.ndarray
    label: np.ndarray
    clips: ClipColumns | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.offset)

    def num_images(self) -> int:
        """Images that it tells of: one of each sample, or all frames of clips."""
        return len(self) if self.clips is None else len(self.clips.offset)

    def key(self, row: int) -> str:
        """The key of one sample."""
        return self.keys[row]


@dataclass(frozen=True)
class _PackedKeys:
    """Keys as one blob, decoded one by one: opening an index must not cost one string per sample."""

    _blob: np.ndarray
    _ends: np.ndarray

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        start = int(self._ends[row - 1]) if row else 0
        return self._blob[start : int(self._ends[row])].tobytes().decode()


def write_index(index: ShardIndex, path: Path) -> None:
    """Write an index atomically, as safetensors."""
    encoded = [index.key(row).encode() for row in range(len(index))]
    columns = {name: np.asarray(getattr(index, name), dtype) for name, dtype in _COLUMNS.items()}
    if index.clips is not None:
        columns |= index.clips.as_columns()
    columns["keys"] = np.frombuffer(b"".join(encoded), np.uint8)
    columns["key_ends"] = np.cumsum([len(key) for key in encoded], dtype=np.uint64)
    with atomic_write(path) as file:
        file.write(save(columns))


def read_index(path: Path, content: bytes | None = None) -> ShardIndex:
    """Read the index of a shard, or take it from what that file would hold.

    Raises:
        InputError: missing or damaged.
    """
    try:
        columns = load_file(path) if content is None else load(content)
        keys = _PackedKeys(columns["keys"], columns["key_ends"])
        index = ShardIndex(keys, *(columns[name] for name in _COLUMNS), clips=clips_in(columns))
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path}: not a readable index ({error}); run {how_to_mend(path.parent)}") from error
    lengths = {len(index.keys), *(len(columns[name]) for name in _COLUMNS)}
    if len(lengths) != 1 or not (index.clips is None or index.clips.fits(len(index))):
        raise InputError(f"{path}: columns of different lengths; run {how_to_mend(path.parent)}")
    return index


def num_indexed(path: Path) -> int:
    """How many samples an index lists, read from its header alone.

    Raises:
        InputError: missing or damaged.
    """
    try:
        with safe_open(path, "numpy") as columns:
            return int(columns.get_slice("offset").get_shape()[0])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable index ({error}); run {how_to_mend(path.parent)}") from error


def how_to_mend(folder: Path) -> str:
    """The command that fixes a damaged index: tars that were converted have a plan, which knows what they held."""
    converted = any((place / "plan").is_dir() for place in (folder, folder.parent))
    return f"`shards verify {folder} --repair`" if converted else f"`shards index {folder}`"
