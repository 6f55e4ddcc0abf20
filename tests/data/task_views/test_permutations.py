from __future__ import annotations

import itertools

import numpy as np
import pytest

from largescale.data.task_views.permutations import permutation_set


def least_distance(found: np.ndarray) -> int:
    return min(int((found[i + 1 :] != found[i]).sum(1).min()) for i in range(len(found) - 1))


def by_a_loop(count: int, places: int) -> list[tuple[int, ...]]:
    """The first of those farthest from all before it, one after the other."""
    chosen: list[tuple[int, ...]] = []
    for _ in range(count):
        every = itertools.permutations(range(places))
        chosen.append(
            max(every, key=lambda one: min((sum(map(int.__ne__, one, own)) for own in chosen), default=places))
        )
    return chosen


@pytest.mark.parametrize("count, least", [(2, 9), (9, 9), (64, 8), (72, 8), (100, 6), (1000, 5), (2000, 4)])
def test_permutations_of_nine_places_differ_in_many(count, least):
    found = permutation_set(count, 9)
    assert found.shape == (count, 9)
    assert (np.sort(found, axis=1) == np.arange(9)).all()
    assert least_distance(found) == least


@pytest.mark.parametrize("count, places", [(2, 4), (12, 4), (24, 4), (1, 1), (40, 5)])
def test_greedy_sets_are_those_of_a_loop(count, places):
    assert permutation_set(count, places).tolist() == [list(one) for one in by_a_loop(count, places)]


def test_a_larger_set_begins_with_the_smaller_one():
    assert (permutation_set(1000, 9)[:100] == permutation_set(100, 9)).all()
    assert (permutation_set(72, 9)[:64] == permutation_set(64, 9)).all()


def test_what_there_is_not_is_refused_and_a_set_cannot_be_changed():
    with pytest.raises(ValueError, match="25 permutations of 4 places: there are 24"):
        permutation_set(25, 4)
    with pytest.raises(ValueError, match="16 places: expected at most 9"):
        permutation_set(5, 16)
    with pytest.raises(ValueError, match="read-only"):
        permutation_set(24, 4)[0, 0] = 3
