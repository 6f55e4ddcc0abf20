"""A store's shards on a local disk: fetched whole, verified, shared by the processes of a node, evicted by need.

    CACHE/NAME-FINGERPRINT/photos-000012.tar     whole and verified, with its index beside it
    CACHE/NAME-FINGERPRINT/.photos-000012.part   on its way; a later fetch continues from there
    CACHE/NAME-FINGERPRINT/.photos-000012.room   as long as the shard: its room is taken
    CACHE/NAME-FINGERPRINT/.photos-000012.lock   held by the one process of the node that fetches it
    CACHE/NAME-FINGERPRINT/.photos-000012.away   why a process that waited for it gave up: the next one asks only once
    CACHE/NAME-FINGERPRINT/.photos-000012.lost   why it was lost: others believe that for a while, then one asks once

A process that needs a missing shard fetches it; a `Fetcher` (fetcher.py) usually did so before. The order says when
a shard is read next, so what is needed last is evicted first. Indexes take no room, and may be here without a tar.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import TypeVar

import xxhash

from largescale.data.cache_counters import Counters
from largescale.data.cache_files import (
    disk_trouble,
    held,
    is_coming,
    lock_of,
    locked,
    part_of,
    recent,
    remove_left,
    room_of,
    write,
)
from shards.format.manifest import Manifest, ShardEntry
from shards.format.shard_index import ShardIndex, index_path, num_indexed, read_index
from shards.format.tar import file_checksum
from shards.ground.errors import InputError
from shards.ground.files import sync_file, sync_folder
from shards.ground.pauses import pause
from shards.stores.store import Missing, Store, Torn

FETCH_ATTEMPTS = 3
"""Fetches of a shard that is missing, or does not match the manifest, before it counts as lost."""

_MISSING_PAUSE_S = 1.0
"""Pause before a missing shard is asked for again, then doubled: stores that have just started, or are being copied
to, may soon have it."""

NEVER = 2**62
"""Next step of a shard that is not read again."""

FOREIGN = -1
"""Next step of a tar that this run does not know."""

NextUse = Callable[[Path], int] | None
"""The step at which this run reads a tar next, or NEVER, or FOREIGN."""

_LOST_REST_S = 300.0
"""A shard that is lost to one process is lost to all of the node for so long: none of them fetches it in vain."""

_FOREIGN_REST_S = 3600.0
"""Other runs' shards that were not opened for this long are evicted first; their other shards only as a last resort."""

_ROOM_PAUSE_S = 0.2


Fetched = TypeVar("Fetched")


class ShardLost(InputError):
    """A shard cannot be fetched, or is not the one in the manifest; the message is the reason."""


@dataclass
class ShardCache:
    """The local copies of one store's shards. Can be sent to other processes and shared by threads.

    Attributes:
        store: where the shards are.
        manifest: of the shards; its root is the folder in the cache.
        capacity: largest size of the whole cache in bytes.
    """

    store: Store
    manifest: Manifest
    capacity: int
    counters: Counters = field(default_factory=Counters)

    def has(self, shard: int) -> bool:
        """Whether the shard is here."""
        return self.manifest.tar_path(shard).exists()

    def get(
        self,
        shard: int,
        next_use: NextUse = None,
        status: Callable[[str], None] = lambda text: None,
        *,
        patient: bool = False,
    ) -> bool:
        """Make sure that a shard is in the cache.

        Args:
            shard: its number in the manifest.
            next_use: shards of this run that are read later than `shard` may be evicted for it. None: those of this
                manifest that were opened longest ago.
            status: called with what is being done, in words.
            patient: the shard is not needed yet: return False if there is no room before others have been read;
                otherwise room is made, at the cost of other runs, and waited for.

        Raises:
            ShardLost: the store does not have it, or it does not match the manifest.
            InputError: the store is away, the cache's disk is full or cannot be written to, or there is no room.
        """
        tar = self.manifest.tar_path(shard)
        if not patient:
            self.counters.add("hits" if self.has(shard) else "misses")
        if self.has(shard):
            return True
        status(f"waiting for another process to fetch {self.store.url}/{tar.name}")
        try:
            with locked(lock_of(tar)):
                status(f"asking {self.store.url} for {tar.name}")
                if self.has(shard):
                    return True
                if reason := self._lost_here(shard, _LOST_REST_S):
                    raise ShardLost(reason)
                if patient and not self._take_room(shard, next_use):
                    return False
                if not patient:
                    self._wait_for_room(shard, next_use, status)
                try:
                    self._fetch_or_recall(shard, next_use, status)
                finally:
                    room_of(tar).unlink(missing_ok=True)
                return True
        except OSError as error:
            raise InputError(disk_trouble(self.manifest.root, error)) from error

    def read_index(self, shard: int) -> ShardIndex:
        """The index of a shard, from the store where the shard is not here: its tar is not fetched.

        Raises:
            InputError: it is missing or damaged, or the store is away.
        """
        entry, path = self.manifest.shards[shard], self.manifest.index_path(shard)
        with suppress(OSError, InputError):
            if _is_index_of(entry, content := path.read_bytes()):
                return read_index(path, content)

        def fetched() -> tuple[bytes, ShardIndex]:
            content = self._index(self.store, shard)
            try:
                return content, read_index(path, content)
            except InputError as error:
                raise _Wrong(f"{path.name} is not a readable index") from error

        content, index = _attempted(fetched, self.store.url, FETCH_ATTEMPTS)
        with suppress(OSError):
            write(path, content)
        return index

    def touch(self, shard: int) -> None:
        """Tell other runs that share the cache that the shard is in use."""
        for path in (self.manifest.tar_path(shard), self.manifest.index_path(shard)):  # those who tidy up look at each
            with suppress(OSError):
                os.utime(path)

    def drop_damaged(self, shard: int, *, look_at_all: bool = False) -> bool:
        """Remove a shard that is not as it arrived, such as one whose index was lost, so that it is fetched again; to
        find changed bytes in its tar too, all of it must be read.

        Returns:
            Whether it was so; one that another process has mended meanwhile stays.
        """
        tar = self.manifest.tar_path(shard)
        with suppress(OSError), locked(lock_of(tar)):
            if self.has(shard) and not self._is_as_it_arrived(shard, look_at_all):
                tar.unlink()  # first: a tar which is here has its index
                index_path(tar).unlink(missing_ok=True)
                return True
        return False

    def _is_as_it_arrived(self, shard: int, look_at_all: bool) -> bool:
        entry, tar = self.manifest.shards[shard], self.manifest.tar_path(shard)
        try:
            index, num_bytes = index_path(tar).read_bytes(), tar.stat().st_size
            is_whole = bool(entry.index_checksum) or num_indexed(index_path(tar)) == entry.num_samples
            is_whole = is_whole and (not look_at_all or file_checksum(tar) == entry.checksum)
        except InputError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):  # its disk has lost it; others, such as EMFILE, may pass
                raise
            return False
        return is_whole and num_bytes == entry.num_bytes and _is_index_of(entry, index)

    def _fetch_or_recall(self, shard: int, next_use: NextUse, status: Callable[[str], None]) -> None:
        """Fetch; if another process has just waited for this shard in vain, ask only once, and fail as it did."""
        away, lost = self._mark(shard, "away"), self._mark(shard, "lost")
        recalled = recent(away, self.store.patience_s)
        attempts = 1 if self._lost_here(shard, inf) else FETCH_ATTEMPTS
        try:
            self._fetch(self.store.impatient() if recalled else self.store, shard, next_use, status, attempts)
        except ShardLost as error:
            with suppress(OSError):
                write(lost, str(error).encode())
            raise
        except InputError as error:
            with suppress(OSError):
                write(away, (recalled or str(error)).encode())
            raise InputError(recalled or str(error)) from error
        for mark in (away, lost):
            mark.unlink(missing_ok=True)

    def _lost_here(self, shard: int, seconds: float) -> str:
        """Why a shard was lost at most `seconds` ago; empty if it was not, or to another store of the same shards."""
        reason = recent(self._mark(shard, "lost"), seconds)
        return reason if reason.startswith(f"{self.store.url}/") else ""

    def _mark(self, shard: int, what: str) -> Path:
        tar = self.manifest.tar_path(shard)
        return tar.with_name(f".{tar.stem}.{what}")

    def _fetch(self, store: Store, shard: int, next_use: NextUse, status: Callable[[str], None], attempts: int) -> None:
        entry, tar = self.manifest.shards[shard], self.manifest.tar_path(shard)
        part = part_of(tar)

        def fetched() -> bytes:
            try:
                self._fetch_once(store, shard, part, next_use, status)
                _check(part, entry)
                return self._index(store, shard)
            except (Missing, _Wrong):
                part.unlink(missing_ok=True)
                raise

        index = _attempted(fetched, f"{self.store.url}/{entry.name}", attempts)
        # The index comes first, so that a tar which is here has its index.
        write(index_path(tar), index)
        sync_file(index_path(tar))
        os.replace(part, tar)
        sync_folder(tar.parent)
        self.counters.add("fetched_bytes", entry.num_bytes)

    def _fetch_once(
        self, store: Store, shard: int, part: Path, next_use: NextUse, status: Callable[[str], None]
    ) -> None:
        entry = self.manifest.shards[shard]

        def progress(done: int) -> None:
            status(f"fetching {self.store.url}/{entry.name}, {done / max(1, entry.num_bytes):.0%} here")

        while True:
            try:
                return store.fetch(entry.name, part, entry.num_bytes, progress)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict_one(shard, next_use):
                    raise

    def _index(self, store: Store, shard: int) -> bytes:
        entry, name = self.manifest.shards[shard], self.manifest.index_path(shard).name
        content = store.read(name)
        if not _is_index_of(entry, content):
            raise _Wrong(f"{name} is not the index named in the manifest")
        return content

    # -- Room -------------------------------------------------------------------------------------------------------

    def _wait_for_room(self, shard: int, next_use: NextUse, status: Callable[[str], None]) -> None:
        """Take room for a shard that is needed now; what cannot be evicted yet is on its way, and can be later."""
        entry, folder, began = self.manifest.shards[shard], self.manifest.root.parent, time.monotonic()
        while not self._take_room(shard, next_use, urgent=True):
            if entry.num_bytes > self.capacity or time.monotonic() - began > self.store.patience_s:
                raise InputError(
                    f"{folder}: no room for {entry.name} ({entry.num_bytes / 1e9:.3g} GB) in a cache of "
                    f"{self.capacity / 1e9:.3g} GB; raise data.cache_gb, or use a separate data.cache"
                )
            status(f"waiting for room in {folder}")
            pause(_ROOM_PAUSE_S)

    def _take_room(self, shard: int, next_use: NextUse, *, urgent: bool = False) -> bool:
        """Evict until a shard fits, and take the room; False if what is left is needed sooner, or on its way.

        One process at a time takes room, so the capacity holds at every moment.
        """
        tar, needed = self.manifest.tar_path(shard), self.manifest.shards[shard].num_bytes
        tar.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.manifest.root.parent / ".room.lock"):
            while sum(other.num_bytes for other in held(tar.parents[1]) if other.tar != tar) + needed > self.capacity:
                if not self._evict_one(shard, next_use, urgent=urgent):
                    return False
            with room_of(tar).open("wb") as room:
                room.truncate(needed)
            return True

    def _evict_one(self, shard: int, next_use: NextUse, *, urgent: bool = False) -> bool:
        """Remove the shard needed last, if that is later than `shard`; with `urgent` also other runs' shards.

        Of fetches that are over, as those of killed processes, the room goes first, and the part as if it were whole.
        """
        foreign, own, needed = [], [], self.manifest.tar_path(shard)
        for other in held(self.manifest.root.parent):
            if not other.here and remove_left(room_of(other.tar), other.tar):
                return True
            is_sibling = other.tar.parent == self.manifest.root
            use = next_use(other.tar) if next_use else -other.touched if is_sibling else FOREIGN
            if use == FOREIGN:
                foreign.append((other.touched, other.here, other.tar))
            elif other.here or not is_coming(other.tar):
                own.append((use, other.tar))
        resting = [one for one in foreign if time.time() - one[0] > _FOREIGN_REST_S]
        if not resting and own and (next_use is None or max(own)[0] > next_use(needed)):
            _, tar = max(own)
            return self._evict(tar) if tar.exists() else remove_left(part_of(tar), tar)
        victims = resting or [one for one in foreign if urgent and one[1]]
        return bool(victims) and self._evict(min(victims)[2])

    def _evict(self, tar: Path) -> bool:
        for path in (tar, index_path(tar), part_of(tar), room_of(tar)):
            path.unlink(missing_ok=True)
        self.counters.add("evicted")
        return True


class _Wrong(Exception):
    """A tar, or its index, is not the one in the manifest."""


def _attempted(fetch: Callable[[], Fetched], where: str, attempts: int) -> Fetched:
    """What comes of a fetch that is made again where the store lacks it or has another. ShardLost: it always does."""
    often, reason = f"fetched {attempts} times" if attempts > 1 else "fetched again", ""
    for attempt in range(attempts):
        try:
            return fetch()
        except _Wrong as error:
            reason = f"{where}: {often}, {error}; restore it, or convert again"
        except Missing as error:
            reason = str(error)
            if isinstance(error, Torn):
                reason += f", {often}; restore it, or convert again"
            if attempt + 1 < attempts:
                pause(_MISSING_PAUSE_S * 2**attempt)
    raise ShardLost(reason)


def open_cache(store: Store, manifest: Manifest, folder: Path, capacity_gb: float) -> ShardCache:
    """The cache of a manifest's shards in a folder.

    Args:
        store: where the shards are.
        manifest: its root becomes a folder below `folder`.
        folder: shared by all runs of this node.
        capacity_gb: 0 is half of what the disk has free or the cache already takes.

    Raises:
        InputError: the folder cannot be written to.
    """
    root = folder / f"{manifest.name}-{manifest.fingerprint[:16]}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".probe-") as probe:
            probe.write(b"x")
            probe.flush()
        for pattern in (".*.away", ".*.lost"):  # outdated, since the store has just answered
            for mark in root.glob(pattern):
                mark.unlink(missing_ok=True)
        free = shutil.disk_usage(root).free + sum(other.num_bytes for other in held(folder) if other.here)
    except OSError as error:
        raise InputError(disk_trouble(root, error)) from error
    capacity = int(capacity_gb * 1e9) if capacity_gb > 0 else free // 2
    return ShardCache(store, replace(manifest, root=root), capacity)


def default_folder() -> Path:
    """The default cache: this user's folder on the node's temporary disk."""
    return Path(tempfile.gettempdir()) / f"largescale-shards-{os.getuid()}"


def _is_index_of(entry: ShardEntry, content: bytes) -> bool:
    """Whether these bytes are the index that the manifest names, if it names one."""
    return not entry.index_checksum or f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}" == entry.index_checksum


def _check(path: Path, entry: ShardEntry) -> None:
    """Compare a file with the manifest. _Wrong: it differs."""
    found = path.stat().st_size
    if found != entry.num_bytes:
        raise _Wrong(f"it has {found:,} bytes, the manifest says {entry.num_bytes:,}")
    if file_checksum(path) != entry.checksum:
        raise _Wrong("its bytes do not match the manifest")
