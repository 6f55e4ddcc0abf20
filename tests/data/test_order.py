from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largescale.data.order import Mixture, Order, rank_places
from largescale.data.random import permute, uniform
from shards.ground.errors import InputError


def make(sizes, **changes) -> Order:
    options = {"seed": 3, "global_batch": 24, "streams": 4, "shuffle_window": 16} | changes
    return Order(sizes, **options)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    streams=st.sampled_from([1, 2, 3, 4, 6, 8, 24]),
    window=st.sampled_from([1, 7, 64, 10_000]),
)
def test_each_sample_at_most_once_and_less_than_a_batch_left_out(sizes, seed, epoch, streams, window):
    if sum(sizes) < 24:
        sizes = [*sizes, 24]
    order = make(sizes, seed=seed, streams=streams, shuffle_window=window)
    first = epoch * order.steps_per_epoch
    ids = np.concatenate([order.samples(step) for step in range(first, first + order.steps_per_epoch)])
    assert len(ids) == len(set(ids.tolist())) == order.num_samples - order.left_out
    assert order.left_out < 24
    assert ids.min() >= 0 and ids.max() < sum(sizes)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 24])
def test_ranks_cut_every_step_into_equal_pieces(ranks):
    step = make([50, 50]).samples(2)
    pieces = [step[rank_places(24, accumulate=1, rank=rank, world_size=ranks)] for rank in range(ranks)]
    assert np.array_equal(np.concatenate(pieces), step)
    assert {len(piece) for piece in pieces} == {24 // ranks}


def test_single_places_of_many_steps_are_those_of_the_whole_batches():
    mixture = Mixture(
        [np.array([30, 41, 9]), np.array([50])], [2.0, 1.0], seed=1, global_batch=24, streams=6, shuffle_window=16
    )
    steps, places = np.arange(11), np.array([5, 23, 0, 16])
    ids, epochs = mixture.samples(steps[:, None], places)
    for step in steps:
        all_ids, all_epochs = mixture.samples(step)
        assert ids[step].tolist() == all_ids[places].tolist()
        assert epochs[step].tolist() == all_epochs[places].tolist()
    assert epochs.max() >= 2, "several epochs are meant to be in it"


def test_a_step_is_a_pure_function():
    assert np.array_equal(make([50, 50]).samples(7), make([50, 50]).samples(7))


def test_epochs_and_seeds_differ():
    order = make([100] * 5)
    assert not np.array_equal(order.samples(0), order.samples(order.steps_per_epoch))
    assert not np.array_equal(order.samples(0), make([100] * 5, seed=4).samples(0))


@pytest.mark.parametrize("sizes", [[50], [33, 18], [10] * 5, [1, 1, 40, 7, 1, 2, 3]])
def test_over_many_epochs_each_sample_is_used_equally_often_within_one(sizes):
    order = make(sizes)
    uses, total = np.zeros(sum(sizes), int), []
    for epoch in range(2 * sum(sizes)):
        used = order.samples(np.arange(2)[:, None] + 2 * epoch)
        uses += np.bincount(used.reshape(-1), minlength=len(uses))
        assert uses.max() - uses.min() <= 1, f"after epoch {epoch}"
        total.append(frozenset(range(len(uses))) - frozenset(used.reshape(-1).tolist()))
    assert len(set(total)) > 1 and set().union(*total) == set(range(len(uses)))


def test_what_is_left_out_is_spread_over_the_shards():
    order = Order([1000] * 10, seed=0, global_batch=4096, streams=4, shuffle_window=64)
    used = order.samples(np.arange(2)[:, None]).reshape(-1)
    left = np.setdiff1d(np.arange(10_000), used)
    assert len(left) == 1808 and np.bincount(left // 1000, minlength=10).min() > 120


def test_corpora_of_a_mixture_use_each_sample_equally_often_within_one():
    sizes = [np.array([30, 41, 13]), np.array([53])]
    mixture = Mixture(sizes, [2.0, 1.0], seed=1, global_batch=24, streams=6, shuffle_window=16)
    ids, epochs = mixture.samples(np.arange(600)[:, None])
    for first, order in zip((0, 84), mixture.orders, strict=True):
        own = (ids >= first) & (ids < first + order.num_samples)
        whole = own & (epochs < epochs[own].max())  # the last epoch is under way
        uses = np.bincount(ids[whole] - first, minlength=order.num_samples)
        assert order.left_out > 0 and epochs[own].max() > 50 and uses.max() - uses.min() <= 1


def test_neighbours_in_a_shard_are_spread_over_the_window():
    order = Order([4096], seed=0, global_batch=64, streams=1, shuffle_window=4096)
    ids = np.concatenate([order.samples(step) for step in range(order.steps_per_epoch)])
    assert abs(np.corrcoef(ids, np.arange(4096))[0, 1]) < 0.06


@pytest.mark.parametrize("num_shards", [1, 8, 64])
def test_a_shard_that_several_streams_and_epochs_read_takes_its_room_once(num_shards):
    order = Mixture([np.full(num_shards, 100)], [1.0], seed=0, global_batch=16, streams=8, shuffle_window=64)
    sizes = np.arange(num_shards) + 1
    for ahead in (0, 3):
        uses = order.uses(0)
        at_once = [
            sizes[np.unique(uses.shard[(uses.first_step - ahead <= step) & (step < uses.end_step)])].sum()
            for step in range(-ahead, 2 * order.steps_per_epoch)
        ]
        assert uses.peak_bytes(sizes, ahead) == max(at_once) <= sizes.sum()


def test_a_billion_samples_cost_memory_of_the_shards_alone():
    order = Order([10_000] * 100_000, seed=0, global_batch=8192, streams=64, shuffle_window=65_536)
    ids = order.samples(100_000)
    assert len(set(ids.tolist())) == 8192 and ids.max() < 10**9


def test_too_few_samples_is_an_error():
    with pytest.raises(InputError, match="holds 23 samples"):
        make([23])


@pytest.mark.parametrize(
    "weights, share, mend", [([2.0, 1.0], 8, "raise data.streams"), ([1.0, 2.0], 16, "give it a smaller weight")]
)
def test_of_several_corpora_the_one_that_is_too_small_is_said_with_the_numbers_that_the_user_wrote(
    weights, share, mend
):
    line = (
        rf"corpus 2 of 2 holds 7 samples, fewer than its share of {share} of train\.global_batch=24; {mend}, or "
        rf"lower train\.global_batch$"
    )
    with pytest.raises(InputError, match=line):
        Mixture([np.array([90]), np.array([3, 4])], weights, seed=1, global_batch=24, streams=3, shuffle_window=16)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, np.uint64(key)).tolist()) == list(range(size))


def test_uniform_numbers_look_uniform_and_do_not_depend_on_their_company():
    values = uniform(0, 1, np.arange(20_000), 2, num=4)
    assert values.shape == (20_000, 4) and values.min() >= 0 and values.max() < 1
    np.testing.assert_allclose(values.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(values.var(0), 1 / 12, atol=0.003)
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.03
    assert np.array_equal(uniform(0, 1, np.array([77]), 2, num=4)[0], values[77])
