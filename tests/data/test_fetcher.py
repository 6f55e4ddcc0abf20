"""Which shards are asked for, and when."""

from __future__ import annotations

import concurrent.futures
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.data import fetcher
from largescale.data.cache import NEVER
from largescale.data.loader import Position
from largescale.data.order import Mixture


class Over(Exception):
    """Enough of it."""


def test_while_the_cache_is_full_only_the_next_shard_is_asked_for(monkeypatch):
    """Of ten shards the first takes long to come, and no other one fits."""
    tried: list[int] = []
    clock = SimpleNamespace(now=1.0, monotonic=lambda: clock.now, sleep=lambda seconds: None)
    comes = threading.Event()

    def fetch_ahead(shard: int) -> bool:
        if shard == 0:
            return comes.wait()
        tried.append(shard)
        return False

    def upcoming(streams: np.ndarray) -> SimpleNamespace:
        if len(tried) > 4:
            raise Over
        return SimpleNamespace(shard=np.arange(10))

    def wait(futures: dict[concurrent.futures.Future, int], timeout: float, return_when: str) -> tuple[set, set]:
        """Until a shard that does not fit is refused; without one, the time passes."""
        soon = {future for future, shard in futures.items() if shard}
        if soon:
            return concurrent.futures.wait(soon, return_when=return_when)
        clock.now += timeout
        return set(), set(futures)

    reader = SimpleNamespace(
        begin_in_process=lambda status: None,
        take_counters=lambda: dict.fromkeys(fetcher._COUNTED, 0),
        is_present=lambda shard: False,
        fetch_ahead=fetch_ahead,
    )
    for name, value in (
        ("ShardReader", lambda *_: reader),
        ("wait", wait),
        ("time", clock),
        ("stopping", SimpleNamespace(live_and_die_with_parent=lambda: None)),
        ("os", SimpleNamespace(nice=lambda by: None)),
    ):
        monkeypatch.setattr(fetcher, name, value)
    needs = SimpleNamespace(upcoming=upcoming, next_use=None)
    try:
        with pytest.raises(Over):
            fetcher._serve([], needs, np.arange(1), 2, torch.zeros(2, dtype=torch.int64))
    finally:
        comes.set()
    assert tried == [1] * 5


def test_what_comes_after_the_run_is_not_needed():
    order = Mixture([np.full(64, 100)], [1.0], seed=0, global_batch=16, streams=2, shuffle_window=64)
    needs = fetcher.Needs(order, 64, np.arange(2), Position())
    needs.end = 40
    read = set((order.samples(np.arange(40)[:, None])[0] // 100).flatten().tolist())
    assert read <= set(needs.upcoming(np.arange(2)).shard.tolist()) < set(range(64))
    assert {shard for shard in range(64) if needs.next_use(shard) < NEVER} == set(needs.upcoming(np.arange(2)).shard)
