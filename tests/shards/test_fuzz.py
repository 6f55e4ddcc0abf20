"""A little of `python -m tests.shards.fuzz`."""

from __future__ import annotations

import pytest

from tests.shards.fuzz import images, run


# 20,000 take about half a minute of one core.
@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damage_is_listed_and_never_ends_a_command(count):
    result = run(count, seed=count)
    assert not result["failures"] and sum(result["tried"].values()) >= count
    assert set(result["tried"]) == {"images", "tars", "zips", "lists"}


def test_a_round_is_the_same_again():
    assert images(1, 2) == images(1, 2) != images(2, 2)
