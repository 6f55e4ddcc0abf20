"""Jobs of a real SLURM are disturbed in every way it knows, queue again, and end as the undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from largescale.checkpoint.folder import find_latest
from largescale.run.owner import newest_owner
from tests.helpers.commands import ROOT, TINY
from tests.helpers.runs import assert_same_end, move_elsewhere
from tests.slurm.conftest import LAUNCH

pytestmark = pytest.mark.slurm


def steps_done(run) -> int:
    path = run / "audit" / "rank-00001.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def start(box, steady, run, *options: str) -> str:
    """Submit the run without a preflight, and wait until it trains."""
    box.environment["PREFLIGHT"] = "no"
    number = box.submit(*steady[0], f"run.dir={run}", *options)
    box.wait(number, lambda: steps_done(run) > 12)
    return number


def starts(box, number) -> int:
    return int(box.job(number, "Restarts")) + 1


def test_a_job_runs_from_preflight_to_completion(box, steady, tmp_path):
    overrides, expected = steady
    run = tmp_path / "run"
    box.environment["PREFLIGHT"] = "yes"
    number = box.submit(*overrides, f"run.dir={run}")
    box.wait_for_end(number)
    log = box.log(number)
    assert "all-reduce of 8 MB over 2 ranks" in log and f"job {number} start 0: complete" in log
    assert_same_end(run, expected)
    output = box.call(
        "sbatch",
        "--parsable",
        "--wait",
        f"--export=ALL,SETUP={box.setup}",
        "--output=evaluate.log",
        LAUNCH / "evaluate.sbatch",
        run,
    )
    assert (run / "eval" / "knn.json").exists() and (run / "report.html").exists(), output


def test_a_signal_saves_and_queues_again(box, steady, tmp_path):
    run = tmp_path / "run"
    number = start(box, steady, run)
    box.call("scancel", "--signal=USR1", number)
    box.wait(number, lambda: box.job(number, "Restarts") == "1")
    stopped = json.loads((run / "status.json").read_text())
    assert stopped["state"] == "stopped" and stopped["step"] > 12
    assert re.search(r"stopped in order: stopped after step \d+ by SIGUSR1", box.log(number))
    box.wait_for_end(number)
    assert_same_end(run, steady[1])


def test_a_preempted_job_saves_and_goes_on_afterwards(box, steady, tmp_path):
    run = tmp_path / "run"
    number = start(box, steady, run)
    urgent = box.call(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=urgent.log",
        "--wrap=sleep 3",
    ).strip()
    box.wait_for_end(urgent)
    assert re.search(r"stopped in order: stopped after step \d+ by SIG", box.log(number))
    box.wait_for_end(number)
    assert starts(box, number) == 2
    assert_same_end(run, steady[1])


def test_a_preempted_evaluation_is_queued_again_and_a_cancelled_one_is_not(box, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "largescale").write_text(
        f'#!/usr/bin/env bash\ntrap "exit 143" TERM\necho "$1" >>{tmp_path}/calls\n'
        '[ "$SLURM_RESTART_COUNT" = 1 ] && [ "$PROTOCOLS" = knn ] || while :; do sleep 0.1; done\n'
    )
    (programs / "largescale").chmod(0o755)
    setup = tmp_path / "setup.sh"
    setup.write_text(f"export PATH={programs}:$PATH\n")

    def begin(protocols: str) -> str:
        (tmp_path / "calls").write_text("")
        settings = f"--export=ALL,SETUP={setup},PROTOCOLS={protocols}"
        number = box.call("sbatch", "--parsable", settings, LAUNCH / "evaluate.sbatch", "run").strip()
        box.wait(number, lambda: (tmp_path / "calls").read_text() != "")
        return number

    number = begin("knn")
    options = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    box.call("sbatch", *options, "--wrap=sleep 1")
    box.wait(number, lambda: starts(box, number) == 2)  # between its starts a job is for a moment in none of the states
    box.wait_for_end(number)
    assert starts(box, number) == 2 and (tmp_path / "calls").read_text().split() == ["evaluate", "evaluate", "report"]
    number = begin("linear")
    box.call("scancel", number)
    box.wait(number, lambda: box.job(number, "JobState") == "CANCELLED")
    assert starts(box, number) == 1


def test_a_lost_node_costs_what_came_after_the_last_checkpoint(box, steady, tmp_path):
    run = tmp_path / "run"
    number = start(box, steady, run)
    saved = find_latest(run / "checkpoints").step
    box.lose_node("n1")
    box.wait(number, lambda: box.job(number, "JobState") == "PENDING")
    box.return_node("n1")
    box.wait_for_end(number)
    assert starts(box, number) == 2 and saved >= 10
    assert_same_end(run, steady[1])


def test_the_time_limit_is_met_in_order(box, steady, tmp_path):
    run = tmp_path / "run"
    # A minute is SLURM's shortest limit; the run stops a minute before it, after its first step. Then it gets more.
    box.environment["PREFLIGHT"] = "no"
    overrides = [*steady[0], f"run.dir={run}", "run.stop_before_s=59.999"]
    number = box.submit(*overrides, "--time", "1", "--", "--signal=USR1@1")
    box.wait(number, lambda: starts(box, number) == 2)
    box.call("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    box.wait_for_end(number)
    assert re.search(r"stopped in order: stopped after step 0 by .*; checkpoint saved", box.log(number))
    assert "TIME LIMIT" not in box.log(number)
    assert_same_end(run, steady[1])


def test_a_run_that_cannot_work_is_not_queued_again(box, steady, tmp_path):
    for preflight, says in [("yes", "preflight failed"), ("no", "no checkpoint after none; not queued again")]:
        box.environment.update(PREFLIGHT=preflight, MAX_RESTARTS="0")
        number = box.submit(*steady[0], f"run.dir={tmp_path / preflight}", "optim.name=adam")
        box.wait(number, lambda number=number: box.job(number, "JobState") == "FAILED")
        assert box.job(number, "Restarts") == "0"
        assert "optim.name=adam: expected one of lars" in box.log(number) and says in box.log(number)


def test_srun_alone_starts_the_ranks(box, steady, tmp_path):
    overrides, expected = steady
    box.call(
        "srun",
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--export=ALL,PYTHONPATH={ROOT},OMP_NUM_THREADS=1",
        sys.executable,
        "-m",
        "largescale",
        "pretrain",
        TINY,
        *overrides,
        f"run.dir={tmp_path / 'run'}",
    )
    assert_same_end(tmp_path / "run", expected)


def test_conversion_as_a_job(box, sample_images, tmp_path):
    shards = tmp_path / "shards"
    box.call(
        "sbatch",
        "--wait",
        f"--export=ALL,SETUP={box.setup}",
        "--output=convert.log",
        LAUNCH / "convert.sbatch",
        sample_images / "train",
        shards,
        "--samples-per-shard",
        "100",
    )
    assert json.loads((shards / "manifest.json").read_text())["shards"]


def test_conversion_as_a_job_array_gives_the_bytes_of_one_process(box, sample_images, tmp_path):
    options = [
        "--name",
        "train",
        "--labels",
        "folder",
        "--samples-per-shard",
        "30",
        "--shuffle",
        "4",
        "--duplicates",
        "near",
        "--radius",
        "2",
    ]
    convert = [sys.executable, "-m", "shards", "convert", sample_images / "train", tmp_path / "one", *options]
    subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)
    submitted = box.call(
        LAUNCH / "convert",
        sample_images / "train",
        tmp_path / "array",
        "--tasks",
        "4",
        "--setup",
        box.setup,
        "--",
        *options,
    )
    last = submitted.split()[-1]
    box.wait(last, lambda: box.job(last, "JobState") == "COMPLETED")
    one, array = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("one", "array")
    )
    assert array == one and len(json.loads(one["manifest.json"])["shards"]) > 4


def test_preempted_tasks_of_a_conversion_are_queued_again_and_the_merge_waits(box, tmp_path):
    programs, calls = tmp_path / "programs", tmp_path / "calls"
    programs.mkdir()
    (programs / "shards").write_text(
        f'#!/usr/bin/env bash\ntrap "exit 143" TERM\necho "$1 ${{*: -1}} $SLURM_RESTART_COUNT" >>{calls}\n'
        '[ -z "$SLURM_ARRAY_TASK_ID" ] || [ "$SLURM_RESTART_COUNT" = 1 ] || while :; do sleep 0.1; done\n'
    )
    (programs / "shards").chmod(0o755)
    (tmp_path / "setup.sh").write_text(f"export PATH={programs}:$PATH\n")
    setup = ["--setup", tmp_path / "setup.sh"]
    last = box.call(LAUNCH / "convert", tmp_path, tmp_path / "out", "--tasks", 2, *setup).split()[-1]
    box.wait(last, lambda: calls.is_file() and len(calls.read_text().splitlines()) == 3)
    options = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    box.call("sbatch", *options, "--wrap=sleep 1")
    box.wait_for_end(last)
    lines = [line.split() for line in calls.read_text().splitlines()]
    assert lines[0] == ["convert", "0/0"] and lines[-1][0] == "merge"
    assert sorted(lines[1:3]) == [["convert", "0/2"], ["convert", "1/2"]]
    assert sorted(lines[3:-1]) == [["convert", "0/2", "1"], ["convert", "1/2", "1"]]


@pytest.fixture
def old_job(box, steady, tmp_path):
    """A job of one node that trains with two ranks and stands still; its number, its ranks, and the run's folder."""
    box.environment.update(PREFLIGHT="no", RANKS_PER_NODE="2", MAX_RESTARTS="0", MAX_REQUEUES="0")
    run = tmp_path / "run"
    number = box.submit(*steady[0], f"run.dir={run}", "run.lease_s=20", "--nodes", 1, "--", "--nodelist=n0")
    box.wait(number, lambda: steps_done(run) > 12)
    ranks = box.ranks_of(number)
    assert len(ranks) == 2
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    yield number, ranks, run
    for name in ("RANKS_PER_NODE", "MAX_RESTARTS", "MAX_REQUEUES", "OWNER_WAIT_S", "SECOND_LOOK_S"):
        box.environment.pop(name, None)
    for rank in box.ranks_of(number):
        os.kill(rank, signal.SIGKILL)


def start_another(box, steady, run) -> str:
    """A second job of the same run on the other node; returns when it has seen that the folder is not its own."""
    number = box.submit(*steady[0], f"run.dir={run}", "run.lease_s=20", "--nodes", 1, "--", "--nodelist=n1")
    box.wait(number, lambda: "checking whether it is alive" in box.log(number))
    return number


def test_a_job_waits_for_an_old_one_that_still_trains(box, steady, old_job):
    old, ranks, run = old_job
    new = start_another(box, steady, run)
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    box.wait_for_end(old)
    box.wait_for_end(new)
    assert f"(job {old}), since" in box.log(new) and f"{run} is complete: 80 steps" in box.log(new)
    assert "now belongs to" not in box.log(old) and "step 80/80" not in box.log(new)
    assert_same_end(run, steady[1])


def test_a_job_leaves_a_run_to_an_old_one_that_goes_on_training(box, steady, old_job):
    old, ranks, run = old_job
    box.environment.update(OWNER_WAIT_S="0", SECOND_LOOK_S="1")  # the old one lives, now and later
    new = start_another(box, steady, run)
    os.kill(ranks[0], signal.SIGCONT)  # it renews its lease, and waits for the other rank
    box.wait(new, lambda: box.job(new, "JobState") == "FAILED")
    assert f"(job {old}), since" in box.log(new) and "is training there; wait for it to end" in box.log(new)
    assert "another training has the run; not queued again" in box.log(new)
    os.kill(ranks[1], signal.SIGCONT)
    box.wait_for_end(old)
    assert_same_end(run, steady[1])


def test_a_job_takes_over_from_an_old_one_that_was_killed(box, steady, old_job):
    old, ranks, run = old_job
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    box.wait(old, lambda: box.job(old, "JobState") == "FAILED")
    # As after the loss of a machine, into which no other can look.
    move_elsewhere(run, newest_owner(run)[0])
    new = start_another(box, steady, run)
    box.wait_for_end(new)
    assert f"(job {old}), since" in box.log(new) and "(silent for" in box.log(new)
    assert_same_end(run, steady[1])
