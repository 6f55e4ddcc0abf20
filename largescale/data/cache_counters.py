"""What a process did with a shard cache."""

from __future__ import annotations

import threading
from dataclasses import dataclass

_counting = threading.Lock()


@dataclass
class Counters:
    """What a process did with the cache.

    Attributes:
        hits, misses: shards that were here when needed, and that were not.
        fetched_bytes: of shards.
        evicted: shards.
    """

    hits: int = 0
    misses: int = 0
    fetched_bytes: int = 0
    evicted: int = 0

    def add(self, name: str, amount: int = 1) -> None:
        """Add to a counter; safe to call from threads."""
        with _counting:
            setattr(self, name, getattr(self, name) + amount)

    def take(self) -> dict[str, int]:
        """The counts since the last call."""
        with _counting:
            taken = dict(vars(self))
            vars(self).update(dict.fromkeys(taken, 0))
        return taken
