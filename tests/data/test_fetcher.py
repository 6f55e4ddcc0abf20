"""Which shards are asked for, and when."""

from __future__ import annotations

import concurrent.futures
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from largescale.data import fetcher
from largescale.data.cache import FOREIGN, NEVER
from largescale.data.corpora import Corpus
from largescale.data.loader import Position
from largescale.data.order import Mixture
from shards.format.manifest import Manifest, ShardEntry


class Over(Exception):
    """Enough of it."""


def test_while_the_cache_is_full_only_the_next_shard_is_asked_for(monkeypatch):
    """Of ten shards the first takes long to come, and no other one fits."""
    tried: list[int] = []
    read: list[int] = []
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now, sleep=lambda seconds: None)
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
        touch=read.append,
    )
    for name, value in (
        ("ShardReader", lambda *_: reader),
        ("wait", wait),
        ("time", clock),
        ("stopping", SimpleNamespace(live_and_die_with_parent=lambda: None)),
        ("os", SimpleNamespace(nice=lambda by: None)),
    ):
        monkeypatch.setattr(fetcher, name, value)
    needs = SimpleNamespace(
        upcoming=upcoming, current=lambda streams: SimpleNamespace(shard=np.array([0])), next_use=None
    )
    try:
        with pytest.raises(Over):
            fetcher._serve([], needs, np.arange(1), 2, torch.zeros(2, dtype=torch.int64))
    finally:
        comes.set()
    assert tried == [1] * 5 and read == [0], "what is being read is touched now and then"


def folder(name: str, subset: np.ndarray | None = None) -> Corpus:
    """64 shards of 100 samples."""
    entries = tuple(ShardEntry(f"{name}-{number:06d}.tar", 100, 10, f"{number}") for number in range(64))
    return Corpus(Manifest(Path(name), name, entries, (), "test", {}, {}), subset=subset)


def needs_of(*corpora: Corpus) -> fetcher.Needs:
    order = Mixture(
        [corpus.shard_sizes() for corpus in corpora],
        [1.0] * len(corpora),
        seed=0,
        global_batch=16,
        streams=2,
        shuffle_window=64,
    )
    return fetcher.Needs(order, list(corpora), np.arange(2), Position())


def test_what_comes_after_the_run_is_not_needed():
    needs = needs_of(folder("a"))
    needs.end = 40
    read = set((needs._order.samples(np.arange(40)[:, None])[0] // 100).flatten().tolist())
    wanted = set(needs.upcoming(np.arange(2)).shard.tolist())
    assert read <= wanted < set(range(64))
    tars = [folder("a").manifest.tar_path(number) for number in range(64)]
    assert {number for number, tar in enumerate(tars) if needs.next_use(tar) < NEVER} == wanted


def test_a_tar_is_needed_for_whichever_corpus_reads_it_first():
    """The second and the third are parts of one folder."""
    corpora = [folder("a"), folder("b", np.arange(3200)), folder("b", np.arange(3200, 6400))]
    needs = needs_of(*corpora[1:])
    tars = [corpora[1].manifest.tar_path(number) for number in range(64)]
    soonest = [needs.next_use(tar) for tar in tars]
    assert max(soonest) < NEVER and min(soonest[:32]) == min(soonest[32:]) == 0
    assert needs.next_use(corpora[0].manifest.tar_path(0)) == FOREIGN
    current = needs.current(np.arange(2)).shard % 64
    assert {number for number, step in enumerate(soonest) if step == 0} == set(current.tolist())
