"""The promises as properties: the same samples and views, whatever the shards, seed, ranks, workers and stops."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from largescale.data.corpora import Corpus
from largescale.data.order import Mixture, rank_places
from largescale.data.stream import Stream
from shards.format.manifest import Manifest, ShardEntry
from shards.ground.errors import InputError
from tests.helpers.streams import make_stream

RANKS = [1, 2, 3, 4, 6, 8]
BATCH = 24
"""All of RANKS divide it."""

sizes_of_a_corpus = st.lists(st.integers(1, 60), min_size=1, max_size=10).map(lambda sizes: [*sizes, BATCH])


def corpus(sizes: list[int], weight: float = 1.0, subset: np.ndarray | None = None) -> Corpus:
    entries = tuple(ShardEntry(f"part-{i:06d}.tar", size, 1000 * size, "") for i, size in enumerate(sizes))
    return Corpus(Manifest(Path("nowhere"), "part", entries, (), "test", {}, {}), weight, subset)


@settings(max_examples=60, deadline=None)
@given(
    corpora=st.lists(st.tuples(sizes_of_a_corpus, st.floats(0.1, 10)), min_size=1, max_size=3),
    seed=st.integers(0, 9),
    streams=st.sampled_from([4, 6, 8, 12, 24]),
    window=st.sampled_from([1, 7, 64, 10_000]),
    stop=st.integers(0, 30),
    before=st.sampled_from(RANKS),
    after=st.sampled_from(RANKS),
)
def test_a_change_of_ranks_at_any_stop_changes_no_step(corpora, seed, streams, window, stop, before, after):
    mixture = Mixture(
        [np.array(sizes) for sizes, _ in corpora],
        [weight for _, weight in corpora],
        seed=seed,
        global_batch=BATCH,
        streams=streams,
        shuffle_window=window,
    )
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(40):
        ids, epochs = mixture.samples(step)
        ranks = before if step < stop else after
        places = [rank_places(BATCH, accumulate=1, rank=rank, world_size=ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(places)) == list(range(BATCH))
        joined = np.concatenate([ids[own] for own in places])
        assert (joined == ids).all()
        first = np.cumsum([0, *(sum(sizes) for sizes, _ in corpora)])
        for number in range(len(corpora)):
            own = (ids >= first[number]) & (ids < first[number + 1])
            assert own.sum() == mixture.stream_counts[number] * BATCH // streams
            for epoch in set(epochs[own].tolist()):
                seen.setdefault((number, epoch), []).extend(ids[own & (epochs == epoch)].tolist())
    for (number, epoch), ids in seen.items():
        assert len(ids) == len(set(ids)), "a sample twice in an epoch"
        if (number, epoch + 1) in seen:  # then this one is over
            order = mixture.orders[number]
            assert len(ids) == order.num_samples - order.left_out and order.left_out < order.global_batch


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 3),
    start=st.integers(0, 20),
    before=st.sampled_from(RANKS),
    after=st.sampled_from(RANKS),
    loaded=st.integers(0, 7),
    workers=st.integers(0, 4),
    threads=st.integers(1, 3),
    window=st.sampled_from([1, 16, 500]),
)
def test_the_views_do_not_depend_on_ranks_workers_threads_or_stops(
    shard_folder, seed, start, before, after, loaded, workers, threads, window
):
    """One rank has loader processes and threads, the others none: 64 processes would not show more than 8."""
    overrides = [
        "train.global_batch=24",
        "data.streams=8",
        "method.queue=24",
        f"run.seed={seed}",
        f"data.shuffle_window={window}",
    ]
    whole = list(make_stream(shard_folder, *overrides)(range(start, start + 4)))
    for ranks, steps in ((before, range(start, start + 2)), (after, range(start + 2, start + 4))):
        loaders = [f"data.workers={workers}", f"data.threads={threads}"]
        parts = [
            list(
                make_stream(
                    shard_folder, *overrides, *(loaders if rank == loaded % ranks else []), rank=rank, ranks=ranks
                )(steps)
            )
            for rank in range(ranks)
        ]
        for place, step in enumerate(steps):
            together = [part[place] for part in parts]
            assert [key for batch in together for key in batch.keys] == whole[step - start].keys
            for group, views in enumerate(whole[step - start].views):
                num = len(views) // BATCH
                joined = torch.cat([batch.views[group].unflatten(0, (num, -1)) for batch in together], dim=1)
                torch.testing.assert_close(joined.flatten(0, 1), views, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    corpora=st.lists(sizes_of_a_corpus, min_size=1, max_size=3),
    seed=st.integers(0, 5),
    step=st.integers(0, 60),
    window=st.sampled_from([1, 7, 64, 10_000]),
)
def test_the_shards_of_a_step_are_those_that_were_announced(corpora, seed, step, window):
    mixture = Mixture(
        [np.array(sizes) for sizes in corpora],
        [1.0] * len(corpora),
        seed=seed,
        global_batch=BATCH,
        streams=8,
        shuffle_window=window,
    )
    ends = np.cumsum([size for sizes in corpora for size in sizes])
    shard_of = np.searchsorted(ends, mixture.samples(step)[0], side="right")
    stream_of = np.arange(BATCH) // mixture.per_stream
    uses = mixture.uses(step)
    now = (uses.first_step <= step) & (step < uses.end_step)
    announced = set(zip(uses.shard[now].tolist(), uses.stream[now].tolist(), strict=True))
    assert set(zip(shard_of.tolist(), stream_of.tolist(), strict=True)) <= announced
    following = mixture.uses(max(0, step - 1))
    assert (np.diff(following.first_step) >= 0).all()


@pytest.mark.parametrize(
    "weights, streams, counts",
    [([1], 8, [8]), ([3, 1], 8, [6, 2]), ([0.7, 0.3], 64, [45, 19]), ([1000, 1], 8, [7, 1]), ([1, 1, 1], 8, [3, 3, 2])],
)
def test_streams_are_shared_by_weight(weights, streams, counts):
    mixture = Mixture(
        [np.array([1000])] * len(weights), weights, seed=0, global_batch=192, streams=streams, shuffle_window=10
    )
    assert mixture.stream_counts == counts


def test_two_folders_are_mixed_by_weight(shard_folder, held_out_shards):
    mixed = f"data.shards=[{{path: {shard_folder}, weight: 3}}, {held_out_shards}]"
    stream: Stream = make_stream(shard_folder, mixed)
    batches = list(stream(range(30)))
    assert stream.num_steps == 14 and stream.order.steps_per_epoch == 300 // 16
    for batch in batches:
        assert (batch.ids < 200).sum() == 12 and (batch.ids >= 200).sum() == 4
    # Each corpus goes through its own epochs: 200 of 12 a step, 100 of 4 a step.
    first = np.concatenate([batch.ids[batch.ids < 200] for batch in batches[:16]])
    second = np.concatenate([batch.ids[batch.ids >= 200] for batch in batches[:25]])
    assert len(set(first)) == len(first) == 192 and len(set(second)) == len(second) == 100
    assert len(set(batches[0].keys)) == 16


def test_more_corpora_than_streams_are_refused(shard_folder, tmp_path):
    folders = [str(shutil.copytree(shard_folder, tmp_path / str(number))) for number in range(5)]
    with pytest.raises(InputError, match=r"lists 5 corpora, which needs data\.streams >= 5, got 4"):
        make_stream(shard_folder, f"data.shards={folders}")
