"""Shards of a store on a local disk: fetched whole, verified, shared by the processes of a node, evicted by need.

    CACHE/NAME-FINGERPRINT/photos-000012.tar     whole and verified, with its index beside it
    CACHE/NAME-FINGERPRINT/.photos-000012.part   on its way; a later fetch goes on from there
    CACHE/NAME-FINGERPRINT/.photos-000012.lock   held by the one process of the node that fetches it

Whoever reads a shard that is not there fetches it; a `Fetcher` (fetcher.py) brings it before that. The order says when
a shard is read next, so what is needed last is evicted first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from shards.errors import InputError
from shards.files import sync_folder
from shards.manifest import Manifest, ShardEntry, index_path
from shards.stores import Missing, Store
from shards.tar import file_checksum

FETCH_ATTEMPTS = 3
"""Fetches of a shard that is not there, or not with the bytes of the manifest, before it counts as lost."""

_MISSING_PAUSE_S = 1.0
"""Before a shard that is not there is asked for again, doubled after that: stores that have just been started, or are
being copied to, soon have what they deny now."""

NEVER = 2**62
"""The step at which a shard is read next that is not read again."""

NextUse = Callable[[int], int] | None

_FOREIGN_REST_S = 3600.0
"""Shards of other runs that were not opened for so long may be evicted."""


class ShardLost(InputError):
    """A shard cannot be had, or is not the one of the manifest; the reason is its message."""


@dataclass
class Counters:
    """What a process did with the cache."""

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    evicted: int = 0


@dataclass
class ShardCache:
    """The local copies of one store's shards. Can be sent to other processes; threads may share it.

    Attributes:
        store: where the shards are.
        manifest: of the shards; its root is the folder in the cache.
        capacity: bytes that the whole cache may take.
    """

    store: Store
    manifest: Manifest
    capacity: int
    counters: Counters = field(default_factory=Counters)

    def has(self, shard: int) -> bool:
        """Whether the shard is here."""
        return self.manifest.tar_path(shard).exists()

    def get(
        self, shard: int, next_use: NextUse = None, status: Callable[[str], None] = lambda text: None, *,
        patient: bool = False,
    ) -> bool:
        """Make sure that a shard is here.

        Args:
            shard: its number in the manifest.
            next_use: the step at which a shard of this manifest is read next, or NEVER; those that are read later
                than `shard` may be evicted for it. None: those that were opened longest ago.
            status: told what is being done, in words.
            patient: return False where there is no room before others have been read; else room is made, and if need
                be the capacity overrun.

        Raises:
            ShardLost: the store does not have it, or not with the bytes of the manifest.
            InputError: the store is away, or the cache's disk is full or cannot be written to.
        """
        tar = self.manifest.tar_path(shard)
        if self.has(shard):
            self.counters.hits += 1
            return True
        status(f"waiting for another process, which fetches {self.store.url}/{tar.name}")
        try:
            with _locked(tar.with_name(f".{tar.stem}.lock")):
                status(f"asking {self.store.url} for {tar.name}")
                if self.has(shard):
                    return True
                self.counters.misses += 1
                if not self._make_room(shard, next_use) and patient:
                    return False
                self._fetch(shard, next_use, status)
                return True
        except OSError as error:
            raise InputError(_disk_trouble(self.manifest.root, error)) from error

    def touch(self, shard: int) -> None:
        """Say that the shard is in use, to other runs that share the cache."""
        with suppress(OSError):
            os.utime(self.manifest.tar_path(shard))

    def _fetch(self, shard: int, next_use: NextUse, status: Callable[[str], None]) -> None:
        entry, tar = self.manifest.shards[shard], self.manifest.tar_path(shard)
        part, reason = tar.with_name(f".{tar.stem}.part"), ""
        for attempt in range(FETCH_ATTEMPTS):
            try:
                self._fetch_once(shard, part, next_use, status)
                _check(part, entry)
                index = self._index(shard)
            except _Wrong as error:
                where = f"{self.store.url}/{entry.name}"
                reason = f"{where}: fetched {FETCH_ATTEMPTS} times, {error}; restore it, or convert again"
                part.unlink(missing_ok=True)
                continue
            except Missing as error:
                reason = str(error)
                part.unlink(missing_ok=True)
                if attempt + 1 < FETCH_ATTEMPTS:
                    time.sleep(_MISSING_PAUSE_S * 2**attempt)
                continue
            # The index comes first: a tar that is here has its index.
            _write(index_path(tar), index)
            os.replace(part, tar)
            sync_folder(tar.parent)
            self.counters.fetched_bytes += entry.num_bytes
            return
        raise ShardLost(reason)

    def _fetch_once(self, shard: int, part: Path, next_use: NextUse, status: Callable[[str], None]) -> None:
        entry = self.manifest.shards[shard]

        def progress(done: int) -> None:
            status(f"fetching {self.store.url}/{entry.name}, {done / max(1, entry.num_bytes):.0%} here")

        while True:
            try:
                return self.store.fetch(entry.name, part, entry.num_bytes, progress)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict_one(shard, next_use):
                    raise

    def _index(self, shard: int) -> bytes:
        entry, name = self.manifest.shards[shard], self.manifest.index_path(shard).name
        content = self.store.read(name)
        if entry.index_checksum and f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}" != entry.index_checksum:
            raise _Wrong(f"{name} is not the index that the manifest names")
        return content

    # -- Room -------------------------------------------------------------------------------------------------------

    def _make_room(self, shard: int, next_use: NextUse) -> bool:
        """Evict until a shard fits; False if what is left is needed before it."""
        self.manifest.root.mkdir(parents=True, exist_ok=True)
        with _locked(self.manifest.root.parent / ".room.lock"):
            while self._used() + self.manifest.shards[shard].num_bytes > self.capacity:
                if not self._evict_one(shard, next_use):
                    return False
            # From here on the shard counts as if it were here.
            tar = self.manifest.tar_path(shard)
            tar.with_name(f".{tar.stem}.part").touch()
            return True

    def _used(self) -> int:
        """Bytes of all shards in the cache; those of this manifest that are on their way count whole."""
        coming = {f".{Path(entry.name).stem}.part": entry.num_bytes for entry in self.manifest.shards}
        return sum(coming.get(path.name, size) if path.parent == self.manifest.root else size
                   for path, size, _ in _files(self.manifest.root.parent))

    def _evict_one(self, shard: int, next_use: NextUse) -> bool:
        """Remove the shard that is needed last, if that is later than `shard` is."""
        number = {entry.name: place for place, entry in enumerate(self.manifest.shards)}
        foreign, own = [], []
        for path, _, touched in _files(self.manifest.root.parent):
            if path.parent != self.manifest.root:
                foreign.append((touched, path))
            elif path.name in number:
                own.append((next_use(number[path.name]) if next_use else -touched, path))
        victim = None
        if foreign and time.time() - min(foreign)[0] > _FOREIGN_REST_S:
            victim = min(foreign)[1]
        elif own and (next_use is None or max(own)[0] > next_use(shard)):
            victim = max(own)[1]
        if victim is None:
            return False
        for path in (victim, index_path(victim)):
            path.unlink(missing_ok=True)
        self.counters.evicted += 1
        return True


class _Wrong(Exception):
    """A tar, or its index, is not the one of the manifest."""


def open_cache(store: Store, manifest: Manifest, folder: Path, capacity_gb: float) -> ShardCache:
    """The cache of a manifest's shards in a folder.

    Args:
        store: where the shards are.
        manifest: its root becomes a folder below `folder`.
        folder: shared by all runs of this node.
        capacity_gb: 0 is half of what the disk has free, or the cache already takes.

    Raises:
        InputError: the folder cannot be written to.
    """
    root = folder / f"{manifest.name}-{manifest.fingerprint[:16]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".probe-") as probe:
            probe.write(b"x")
            probe.flush()
        free = shutil.disk_usage(root).free + sum(size for _, size, _ in _files(folder))
    except OSError as error:
        raise InputError(_disk_trouble(root, error)) from error
    capacity = int(capacity_gb * 1e9) if capacity_gb > 0 else free // 2
    return ShardCache(store, _at(manifest, root), capacity)


def default_folder() -> Path:
    """Where the cache is if nothing else is said: this user's folder on the node's temporary disk."""
    return Path(tempfile.gettempdir()) / f"largescale-shards-{os.getuid()}"


def _at(manifest: Manifest, root: Path) -> Manifest:
    return Manifest(root, manifest.name, manifest.shards, manifest.classes, manifest.source, manifest.settings,
                    manifest.skipped)


def _files(folder: Path) -> Iterator[tuple[Path, int, float]]:
    """Tars of a cache, and those on their way: path, bytes, when they were last touched."""
    for pattern in ("*/*.tar", "*/.*.part"):
        for path in folder.glob(pattern):
            with suppress(FileNotFoundError):
                facts = path.stat()
                yield path, facts.st_size, facts.st_mtime


def _check(path: Path, entry: ShardEntry) -> None:
    """Compare a file with the manifest. _Wrong: it differs."""
    found = path.stat().st_size
    if found != entry.num_bytes:
        raise _Wrong(f"it has {found:,} bytes, the manifest says {entry.num_bytes:,}")
    if file_checksum(path) != entry.checksum:
        raise _Wrong("its bytes are not those that the manifest names")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _disk_trouble(root: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (f"{root}: the disk of the shard cache is full; make room, lower data.cache_gb, or set data.cache to a "
                f"folder on a larger disk")
    return f"{root}: the shard cache cannot be written ({error.strerror or error}); set data.cache to another folder"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that one process (or thread) of the node can hold; it ends with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
