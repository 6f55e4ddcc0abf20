"""The format of a shard folder: one manifest, and beside every tar an index of its samples.

    NAME-000000.tar                        plain WebDataset: KEY.png [KEY.cls] ...
    NAME-000000.index.safetensors          one column per attribute, one row per sample
    manifest.json                          written last: a folder with a manifest is whole

The index is in shard_index.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from shards.format.shard_index import how_to_mend, index_path, num_indexed
from shards.ground.errors import InputError
from shards.ground.files import atomic_write
from shards.images.names import is_image

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_LOOKED_AT = 1000
"""Names in a folder, to say what else it is."""


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a folder: file name, samples, bytes, and `xxh3-128:<hex>` of the whole file and of its index.

    Folders of earlier versions have no checksum of the index: it is empty then.
    """

    name: str
    num_samples: int
    num_bytes: int
    checksum: str
    index_checksum: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds and where it came from; `root` is where its files are (or, of a store, will be)."""

    root: Path
    name: str
    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...]
    source: str
    settings: dict[str, Any]
    skipped: dict[str, int]

    @cached_property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.num_bytes for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the samples and their order, wherever the folder is."""
        text = "\n".join(f"{shard.name} {shard.num_samples} {shard.checksum}" for shard in self.shards)
        return xxhash.xxh3_128_hexdigest(text.encode())

    def tar_path(self, shard: int) -> Path:
        """Path of the tar with this number."""
        return self.root / self.shards[shard].name

    def index_path(self, shard: int) -> Path:
        """Path of the index beside that tar."""
        return index_path(self.tar_path(shard))


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a shard folder.

    Raises:
        InputError: no folder, no manifest, or one that does not describe shards.
    """
    root = Path(folder)
    path = root / MANIFEST_NAME
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; make shards with `shards convert IMAGES {root}`")
    if not path.is_file():
        if any(is_image(entry.name) for entry in islice(root.rglob("*"), _LOOKED_AT)):
            raise InputError(f"{root}: images and not shards; make shards of them with `shards convert {root} OUT`")
        raise InputError(
            f"{root}: no {MANIFEST_NAME}, so this is not a (finished) shard folder; run `shards index {root}` for "
            f"tars made by other tools, or `shards convert` again"
        )
    return parse_manifest(path.read_bytes(), root, where=str(path))


def parse_manifest(content: bytes, root: Path, *, where: str) -> Manifest:
    """The manifest in these bytes; `where` names them to the user.

    Raises:
        InputError: they do not describe shards.
    """
    try:
        read = json.loads(content)
        if read["version"] != FORMAT_VERSION:
            raise InputError(f"{where}: format version {read['version']}, this program reads {FORMAT_VERSION}")
        manifest = Manifest(
            root,
            str(read["name"]),
            tuple(_entry(row) for row in read["shards"]),
            tuple(read["classes"]),
            str(read["source"]),
            dict(read["settings"]),
            dict(read["skipped"]),
        )
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where}: not a manifest ({type(error).__name__}: {error}); restore it, or remove it "
            f"and run the same `shards convert` again (for tars made by other tools, `shards index`)"
        ) from error
    _reject_paths(where, manifest)
    return manifest


def write_manifest(manifest: Manifest) -> None:
    """Write the manifest atomically; its bytes depend on its content alone."""
    content = {
        "version": FORMAT_VERSION,
        "name": manifest.name,
        "source": manifest.source,
        "settings": manifest.settings,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "skipped": dict(sorted(manifest.skipped.items())),
        "classes": list(manifest.classes),
        "shards": [
            {
                "name": s.name,
                "samples": s.num_samples,
                "bytes": s.num_bytes,
                "checksum": s.checksum,
                **({"index": s.index_checksum} if s.index_checksum else {}),
            }
            for s in manifest.shards
        ],
    }
    with atomic_write(manifest.root / MANIFEST_NAME) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def check_files(manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Check that every tar and index is there, with the bytes and the samples listed; reads no more than headers.

    With `parts`, only every `parts`-th shard, from number `part` on: other processes check the rest.

    Raises:
        InputError: naming the first file that is not as the manifest says.
    """
    for number in range(part, len(manifest.shards), parts):
        shard = manifest.shards[number]
        tar, index = manifest.tar_path(number), manifest.index_path(number)
        for path in (tar, index):
            if not path.is_file():
                raise InputError(f"{path}: missing, though {MANIFEST_NAME} lists it; restore it or convert again")
        size = tar.stat().st_size
        if size != shard.num_bytes:
            raise InputError(
                f"{tar}: is {size:,} bytes, the manifest says {shard.num_bytes:,}: it was truncated or replaced; "
                f"restore it, or convert again and run `shards verify {manifest.root}`"
            )
        indexed = num_indexed(index)
        if indexed != shard.num_samples:
            raise InputError(
                f"{index}: lists {indexed} samples, the manifest says {shard.num_samples}; run "
                f"{how_to_mend(manifest.root)}"
            )


def _entry(row: dict[str, Any]) -> ShardEntry:
    return ShardEntry(
        str(row["name"]), int(row["samples"]), int(row["bytes"]), str(row["checksum"]), str(row.get("index", ""))
    )


def _reject_paths(where: str, manifest: Manifest) -> None:
    if not _is_plain(manifest.name):  # caches of stores name their folders by it
        raise InputError(f"{where}: its name {manifest.name!r} is not a plain name without slashes")
    for shard in manifest.shards:
        if not _is_plain(shard.name) or not shard.name.endswith(".tar"):
            raise InputError(f"{where}: shard name {shard.name!r} is not a plain file name ending in .tar")


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\0" not in name
