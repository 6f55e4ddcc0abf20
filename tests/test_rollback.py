from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from largescale.observe.spikes import SpikeWatch
from largescale.rollback import DataSteps, Rollbacks

windows_strategy = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=5).map(
    lambda pairs: [(first, first + length) for first, length in pairs])


@given(windows_strategy, st.integers(0, 40), st.integers(0, 40))
def test_data_steps_are_those_outside_the_windows(windows, first_step, more):
    num_steps = first_step + more
    outside = [step for step in range(300) if not any(first <= step < end for first, end in windows)]
    steps = DataSteps(first_step, num_steps, windows)
    assert list(steps) == outside[first_step:num_steps]
    assert len(steps) == more


def test_without_windows_a_late_start_costs_nothing():
    assert next(iter(DataSteps(10**12, 10**12 + 1))) == 10**12


def test_the_window_ends_at_the_bad_step_and_begins_no_earlier_than_the_checkpoint(tmp_path):
    rollbacks = Rollbacks(tmp_path)
    assert rollbacks.windows() == []
    rollbacks.record(step=27, to=20, data_step=27, window=3, why="loss")
    assert rollbacks.windows() == [(25, 28)]
    # Step 26 used data step 29 then; the checkpoint of step 24 was trained up to data step 24.
    rollbacks.record(step=26, to=24, data_step=29, window=100, why="loss")
    assert rollbacks.windows() == [(25, 28), (24, 30)]
    assert [row["to"] for row in rollbacks.rows()] == [20, 24]


def test_a_spike_is_out_of_proportion_and_does_not_join_the_average():
    watch = SpikeWatch(10.0)
    assert not any(watch.look(1.0 + 0.5 * (step % 2)) for step in range(200))
    resumed = SpikeWatch(10.0, watch.state)
    assert "is 16.0 times the running average" in resumed.look(20.0)
    assert resumed.state == watch.state
    assert not resumed.look(0.0) and resumed.state == watch.state
    assert not resumed.look(5.0)


def test_spikes_are_looked_for_only_when_asked_and_not_at_the_start():
    assert not any(SpikeWatch(0.0, [1.0, 500.0]).look(norm) for norm in (1.0, 1e9))
    watch = SpikeWatch(2.0)
    assert not any(watch.look(norm) for norm in (1.0, 100.0, 1.0))
