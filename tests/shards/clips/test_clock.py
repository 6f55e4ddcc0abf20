"""Clocks of files that are wrong: what times frames get."""

from __future__ import annotations

import pytest

from shards.clips.clock import RisingClock


@pytest.mark.parametrize(
    ("times", "expected", "jump"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], None),
        ([0, 1, 1.25, 1.5, 4], [0, 1, 1.25, 1.5, 4], None),  # each lasts a second by its header
        ([0, 1, None, 3], [0, 1, 2, 3], None),
        ([0, 1, 2, 9, 4, 5], [0, 1, 2, 3, 4, 5], None),  # one wrong time
        ([0, 1, 2, 0.5, 4, 5], [0, 1, 2, 3, 4, 5], None),
        ([0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], 3),  # two files
        ([0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5], 2),
        ([7, 8, 2, 3, 11, 12], [7, 8, 9, 10, 11, 12], 9),  # the clock returns
        ([0, -3, -2, -1], [0, 1, 2, 3], 1),
    ],
)
def test_times_never_fall_and_are_those_of_the_file_where_they_can_be(times, expected, jump):
    clock = RisingClock()
    found = list(clock.follow((time, 1.0, number) for number, time in enumerate(times)))
    assert [number for _, number in found] == list(range(len(times)))
    assert [time for time, _ in found] == expected
    assert clock.jump == jump and clock.end == expected[-1] + 1
    assert clock.has_wrong_times == any(a is not None and a != b for a, b in zip(times, expected, strict=True))


def test_a_clock_that_is_behind_by_a_little_is_imprecise_and_has_not_jumped():
    clock = RisingClock()
    found = clock.follow((time, 0.25, None) for time in [0, 0.25, 0.5, 0.25, 0.375, 0.5, 2])
    assert [time for time, _ in found] == [0, 0.25, 0.5, 0.75, 0.875, 1, 2]
    assert clock.has_wrong_times and clock.jump is None
