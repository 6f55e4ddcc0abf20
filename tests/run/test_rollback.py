"""Covers: largescale/observe/spikes.py"""

from __future__ import annotations

import gc
import importlib
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from largescale.checkpoint.folder import Checkpoint
from largescale.config import load_config
from largescale.data.loaded import Batch
from largescale.methods.method import Output
from largescale.observe.spikes import SpikeWatch, spike_state
from largescale.optim.roles import MAIN
from largescale.prune.rewind import _progress
from largescale.run.logs import Logs
from largescale.run.rollback import DataSteps, Rollbacks
from shards.ground.errors import InputError
from tests.helpers.commands import TINY
from tests.helpers.ranks import run_ranks

windows_strategy = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=5).map(
    lambda pairs: [(first, first + length) for first, length in pairs]
)


@given(windows_strategy, st.integers(0, 40), st.integers(0, 40))
def test_data_steps_are_those_outside_the_windows(windows, first_step, more):
    num_steps = first_step + more
    outside = [step for step in range(300) if not any(first <= step < end for first, end in windows)]
    steps = DataSteps(first_step, num_steps, windows)
    assert list(steps) == outside[first_step:num_steps]
    assert len(steps) == more


def test_without_windows_a_late_start_costs_nothing():
    assert next(iter(DataSteps(10**12, 10**12 + 1))) == 10**12


def checkpoint(run: Path, step: int, *rows: dict) -> Checkpoint:
    """One that was saved when the run had gone back for these rows."""
    return Checkpoint(run / "checkpoints" / f"step-{step:08d}", {"step": step, "rollbacks": list(rows)})


def test_what_is_left_out_travels_with_the_checkpoint(tmp_path, caplog):
    here, elsewhere = Rollbacks(tmp_path / "a"), Rollbacks(tmp_path / "b")
    saved = checkpoint(tmp_path, 20)
    here.record(saved, step=27, data_step=27, window=3, why="loss")
    [first] = here.rows()
    for own in (here, elsewhere):  # also a folder that has nothing but this checkpoint
        own.settle(saved)
        assert own.rows() == [first]
    # The run then saved step 30 and went back to it twice; whoever starts from either knows all that folder knows.
    later = checkpoint(tmp_path, 30, first)
    here.record(later, step=35, data_step=37, window=1, why="loss")
    here.record(later, step=33, data_step=35, window=1, why="loss")
    elsewhere.settle(later)
    here.settle(saved)
    assert elsewhere.rows() == here.rows() and [row["step"] for row in here.rows()] == [27, 35, 33]
    assert not caplog.text
    # Another history: the checkpoint counts.
    other = Rollbacks(tmp_path / "c")
    other.record(checkpoint(tmp_path, 5), step=8, data_step=8, window=1, why="loss")
    other.settle(later)
    assert other.rows() == here.rows() and "disagrees with" in caplog.text


@pytest.mark.parametrize(
    "row", ["{}", "[1]", '{"without": [3, 4', '{"without": [3]}', '{"without": [4, 3]}', '{"without": ["a", "b"]}']
)
def test_a_file_that_is_no_list_of_rollbacks_is_refused(tmp_path, row):
    (tmp_path / "rollbacks.jsonl").write_text(f"{row}\n")
    with pytest.raises(InputError, match="is not a record of a rollback"):
        Rollbacks(tmp_path).windows()


def test_the_window_ends_at_the_bad_step_and_begins_no_earlier_than_the_checkpoint(tmp_path):
    rollbacks = Rollbacks(tmp_path)
    assert rollbacks.windows() == []
    rollbacks.record(checkpoint(tmp_path, 20), step=27, data_step=27, window=3, why="loss")
    assert rollbacks.windows() == [(25, 28)]
    # Step 26 used data step 29 then; the checkpoint of step 24 was trained up to data step 24.
    rollbacks.record(checkpoint(tmp_path, 24), step=26, data_step=29, window=100, why="loss")
    assert rollbacks.windows() == [(25, 28), (24, 30)]
    assert [row["to"] for row in rollbacks.rows()] == [20, 24]


def left_out_on_this_rank(folder: str) -> tuple[list[tuple[int, int]], int]:
    """Where rank 1 does not see yet what rank 0 has written."""
    rollbacks = Rollbacks(Path(folder) / str(dist.get_rank()))
    if dist.get_rank() == 0:
        rollbacks.record(checkpoint(Path(folder), 20), step=27, data_step=27, window=3, why="loss")
    return rollbacks.windows(), rollbacks.number()


@pytest.mark.distributed
def test_all_ranks_leave_out_what_rank_0_has_recorded(tmp_path):
    assert run_ranks(left_out_on_this_rank, 2, str(tmp_path)) == [([(25, 28)], 1)] * 2


def test_who_rewinds_leaves_out_what_the_run_left_out_after_it_had_saved(tmp_path):
    saved = checkpoint(tmp_path, 20)
    Rollbacks(tmp_path).record(saved, step=27, data_step=27, window=3, why="loss")
    config = load_config(TINY, ["data.shards=x"])
    progress = Checkpoint(saved.path, {**saved.progress, "files": {}})
    assert [row["without"] for row in _progress(progress, config, {})["rollbacks"]] == [[25, 28]]


def test_a_spike_is_out_of_proportion_and_does_not_join_the_average():
    watch = SpikeWatch(10.0)
    assert not any(watch.look(1.0 + 0.5 * (step % 2)) for step in range(200))
    resumed = SpikeWatch(10.0, watch.state)
    assert "is 16.0 times the running average" in resumed.look(20.0)
    assert resumed.state == watch.state
    assert not resumed.look(0.0) and resumed.state == watch.state
    assert not resumed.look(5.0)


class Circle:
    """As an engine, which refers to itself."""

    def __init__(self) -> None:
        self.self = self


def test_what_a_run_goes_back_from_is_gone_before_it_begins_again(tmp_path, monkeypatch):
    alive: list[weakref.ref[Circle]] = []

    def train(*_: object) -> bool:
        assert not any(circle() for circle in alive)
        alive.append(weakref.ref(Circle()))
        return len(alive) == 2

    loop = importlib.import_module("largescale.pretrain")  # the package has the function by this name
    monkeypatch.setattr(loop, "_train", train)
    gc.disable()
    try:
        loop.pretrain(load_config(TINY, ["data.shards=x", f"run.dir={tmp_path}"]))
    finally:
        gc.enable()
    assert len(alive) == 2


def test_a_full_disk_does_not_hide_why_a_run_stops(tmp_path, caplog):
    (tmp_path / "trouble").touch()  # no folder can be made there
    batch = Batch(step=3, ids=torch.arange(2), keys=[], views=[], facts={}, skipped=[], substituted=[], costs={})
    Logs(tmp_path).trouble(3, batch, Output(torch.tensor(1.0), {}, {}), "loss not finite")
    assert f"step 3: {tmp_path}/trouble" in caplog.text


def test_each_objective_is_compared_with_itself():
    """As where stages follow each other: the norms of one say nothing of the next one's."""
    watch = SpikeWatch(10.0)
    assert not any(watch.look(1.0, "first") for _ in range(150))
    assert not any(watch.look(1000.0) for _ in range(150))
    assert "first: gradient norm 20 is 20.0 times" in SpikeWatch(10.0, watch.state).look(20.0, "first")
    assert not watch.look(20.0)


def test_a_state_that_is_being_saved_stays_that_of_its_step():
    watch = SpikeWatch(10.0)
    watch.look(1.0)
    saved = watch.state
    watch.look(3.0)
    assert saved == {MAIN: [1.0, 1.0]} and watch.state == {MAIN: [2.0, 2.0]}


def test_a_checkpoint_of_before_objectives_has_the_last_ones_average():
    assert spike_state([2.0, 300.0]) == {MAIN: [2.0, 300.0]} == spike_state({MAIN: [2.0, 300.0]})


def test_spikes_are_looked_for_only_when_asked_and_not_at_the_start():
    assert not any(SpikeWatch(0.0, {MAIN: [1.0, 500.0]}).look(norm) for norm in (1.0, 1e9))
    watch = SpikeWatch(2.0)
    assert not any(watch.look(norm) for norm in (1.0, 100.0, 1.0))
