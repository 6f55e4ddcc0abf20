"""Where finished shards go: they stay in the folder they were written to, or are uploaded to a store.

Either way a split has a folder of its own: the training images lie at the top, others below it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shards.conversion.conversion_plan import HOLDOUT, TRAIN
from shards.format.ledger import SKIPPED_NAME
from shards.format.manifest import MANIFEST_NAME, Manifest, ShardEntry, check_files
from shards.format.shard_index import INDEX_SUFFIX, index_path
from shards.ground.errors import InputError
from shards.ground.files import remove_partial_files
from shards.stores.store import Missing, Store

SPLITS = (HOLDOUT, TRAIN)
"""In the order in which they are finished: a training folder with a manifest has all it belongs with."""


class LocalTarget:
    """Shards stay where they are written."""

    def __init__(self, home: Path) -> None:
        self.home, self.location = home, str(home)

    def folder(self, split: str) -> Path:
        """Where a split is written."""
        return self.home if split == TRAIN else self.home / split

    def publish(self, split: str, paths: list[Path]) -> None:
        """Bring whole files to where they belong."""

    def has(self, split: str, entry: ShardEntry) -> bool:
        """Whether a shard is there, with its index, as long as it should be."""
        tar = self.folder(split) / entry.name
        return tar.exists() and tar.stat().st_size == entry.num_bytes and index_path(tar).exists()

    def is_finished(self) -> bool:
        """Whether it has a manifest."""
        return (self.home / MANIFEST_NAME).exists()

    def strangers(self) -> list[str]:
        """Tars that are not to be touched by a conversion that begins here."""
        return sorted(path.name for path in self.home.glob("*.tar") if not index_path(path).exists())

    def check(self, manifest: Manifest, split: str) -> None:
        """Check that all that a manifest lists is there. InputError: naming what is not."""
        check_files(manifest)

    def clear(self) -> None:
        """Remove what an earlier conversion left, the manifests first."""
        for split in reversed(SPLITS):
            folder = self.folder(split)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            for tar in folder.glob("*.tar"):
                if index_path(tar).exists():
                    tar.unlink()
            for pattern in (f"*{INDEX_SUFFIX}", SKIPPED_NAME):
                for path in folder.glob(pattern):
                    path.unlink()
            if folder.is_dir():
                remove_partial_files(folder)
            if split != TRAIN:
                with suppress(OSError):
                    folder.rmdir()


class StoreTarget:
    """Shards are uploaded when they are whole, and removed from the folder they were written to."""

    def __init__(self, url: str, home: Path) -> None:
        self.home, self.location = home, url.rstrip("/")
        self._stores = {
            split: Store(self.location if split == TRAIN else f"{self.location}/{split}") for split in SPLITS
        }
        self._sizes: dict[str, dict[str, int]] = {}

    def folder(self, split: str) -> Path:
        """See `LocalTarget`."""
        return self.home / "uploads" / split

    def publish(self, split: str, paths: list[Path]) -> None:
        """See `LocalTarget`."""
        for path in paths:
            self._stores[split].put(path, path.name)
            path.unlink()

    def has(self, split: str, entry: ShardEntry) -> bool:
        """See `LocalTarget`. The store is listed once."""
        sizes = self._listing(split)
        return sizes.get(entry.name) == entry.num_bytes and index_path(Path(entry.name)).name in sizes

    def is_finished(self) -> bool:
        """See `LocalTarget`."""
        return MANIFEST_NAME in self._listing(TRAIN)

    def strangers(self) -> list[str]:
        """See `LocalTarget`. All of them: those with an index may be of a conversion with another plan."""
        return [name for name in self._listing(TRAIN) if name.endswith(".tar")]

    def check(self, manifest: Manifest, split: str) -> None:
        """See `LocalTarget`."""
        self._sizes.pop(split, None)
        for entry in manifest.shards:
            if not self.has(split, entry):
                raise InputError(
                    f"{self.location}: {entry.name} or its index is missing there, or is not {entry.num_bytes:,} "
                    f"bytes; run the same conversion again to rewrite it"
                )

    def clear(self) -> None:
        """See `LocalTarget`: shards are those that the manifest lists, and those that have an index."""
        for split in reversed(SPLITS):
            found, store = self._listing(split), self._stores[split]
            for name in sorted(found, key=lambda name: (name != MANIFEST_NAME, not name.endswith(".tar"))):
                is_ours = name in (MANIFEST_NAME, SKIPPED_NAME) or name.endswith(INDEX_SUFFIX)
                if is_ours or (name.endswith(".tar") and index_path(Path(name)).name in found):
                    store.remove(name)
        self._sizes = {}

    def _listing(self, split: str) -> dict[str, int]:
        if split not in self._sizes:
            try:
                entries = self._stores[split].entries()
            except Missing:
                entries = []
            self._sizes[split] = {name: size for name, is_folder, size in entries if not is_folder}
        return self._sizes[split]


Target = LocalTarget | StoreTarget
