"""Sampling from a tree: caps against a loop, shares by hand, members by hash and by distance."""

from __future__ import annotations

import numpy as np
import pytest

from largescale.curate.sampling import capped, members, shares

KEYS = np.arange(99, dtype=np.uint64)


def loop(sizes: list[int], target: int) -> list[int]:
    """One image at a time, to the clusters that have given least, the first first."""
    given = [0] * len(sizes)
    for _ in range(min(target, sum(sizes))):
        open_ones = [number for number, size in enumerate(sizes) if given[number] < size]
        given[min(open_ones, key=lambda number: given[number])] += 1
    return given


@pytest.mark.parametrize(
    "sizes, target, expected",
    [
        ([1, 2, 10, 10], 12, [1, 2, 5, 4]),
        ([1, 2, 10, 10], 11, [1, 2, 4, 4]),
        ([1, 2, 10, 10], 23, [1, 2, 10, 10]),
        ([1, 2, 10, 10], 99, [1, 2, 10, 10]),
        ([5, 5, 5], 2, [1, 1, 0]),
        ([0, 3], 2, [0, 2]),
    ],
)
def test_caps_by_hand(sizes, target, expected):
    found = capped(np.array(sizes), np.zeros(len(sizes), int), np.array([target]), KEYS[: len(sizes)])
    assert found.tolist() == expected == loop(sizes, target)


def test_caps_of_many_groups_are_those_of_a_loop():
    generator = np.random.default_rng(0)
    sizes, groups = generator.zipf(1.5, 300).clip(max=10**6), generator.integers(0, 20, 300)
    totals = np.bincount(groups, sizes, minlength=20).astype(int)
    targets = (totals * generator.uniform(0, 1.1, 20)).astype(int).clip(max=3000)
    found = capped(sizes, groups, targets, np.arange(300, dtype=np.uint64))
    for group in range(20):
        assert found[groups == group].tolist() == loop(sizes[groups == group].tolist(), targets[group])


def test_which_clusters_give_one_more_follows_from_the_seed():
    sizes = np.full(50, 10)
    one, again, other = (shares(sizes, [], 120, seed) for seed in (1, 1, 2))
    assert one.tolist() == again.tolist() != other.tolist()
    assert set(one) == {2, 3} and one.sum() == other.sum() == 120


def test_clusters_of_every_level_may_be_empty():
    parents = [np.array([0, 0, 2]), np.array([0, 0, 1, 1, 1])]  # of five clusters in the middle, the last are empty
    assert shares(np.array([5, 5, 5]), parents, 6, 0).sum() == 6
    assert shares(np.array([5, 5, 5]), [np.zeros(3, int), np.zeros(2, int)], 6, 0).sum() == 6


def test_a_tree_is_shared_from_the_top():
    """Two halves of the same weight at the top get the same, however many clusters and images they have below."""
    parents = [np.array([0, 0, 0, 1]), np.array([0, 1])]
    found = shares(np.array([100, 100, 4, 50]), parents, 40, 0)
    assert found.tolist() == [8, 8, 4, 20]
    assert shares(np.array([100, 100, 4, 3]), parents, 40, 0)[3] == 3, "the smaller half gives all it has"
    assert shares(np.array([100, 100, 4, 3]), parents, 40, 0).sum() == 40
    assert shares(np.array([3, 4, 5]), [np.array([0, 0, 0])], 99, 0).tolist() == [3, 4, 5]


def test_members_are_drawn_by_hash_or_by_distance():
    clusters, samples = np.repeat([0, 1, 2], [4, 3, 1]), np.arange(100, 108)
    wanted = np.array([2, 3, 0])
    found = members(clusters, samples, wanted, 7)
    assert np.bincount(clusters, found).tolist() == [2, 3, 0] and set(found) == {0, 1}
    order = np.random.default_rng(0).permutation(8)
    again = members(clusters[order], samples[order], wanted, 7)
    assert again.tolist() == found[order].tolist(), "an image is drawn by its number, not by its place"
    drawn = [members(clusters, samples, wanted, seed)[:4] for seed in range(400)]
    assert np.abs(np.mean(drawn, 0) - 0.5).max() < 0.1
    distances = np.array([3.0, 1.0, 2.0, 0.5, 1, 1, 1, 0])
    assert members(clusters, samples, wanted, 7, distances)[:4].tolist() == [0, 1, 0, 1]


def test_small_clusters_repeat_only_as_often_as_they_are_asked_to():
    found = members(np.array([0, 0, 0, 1]), np.arange(4), np.array([7, 3]), 0)
    assert sorted(found[:3]) == [2, 2, 3] and found[3] == 3
