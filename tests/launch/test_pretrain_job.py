"""When a SLURM job queues again: launch/slurm/pretrain.sbatch with programs in the place of SLURM's, which say what the
test says.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

DONE = "40 of 80 steps"
STOPPED = f"run: stopped, {DONE} at 2026-01-01 10:00:00; newest checkpoint: step 40"
STOPPED_LATER = STOPPED.replace("10:00:00", "11:00:00")
STOPPED_FIRST = "run: stopped, 0 of 80 steps at 2026-01-01 10:00:00; newest checkpoint: none"
NOT_STARTED = "run: not started; newest checkpoint: none"
RUNNING = f"run: running, {DONE}; newest checkpoint: step 40; pid 7 on n1"
GONE = f"run: not running since 2026-01-01 10:00:00, {DONE}; newest checkpoint: step 40; pid 7 on n1, is gone"
COMPLETE = "run: complete, 80 of 80 steps at 2026-01-01 10:00:00; newest checkpoint: step 80"

FOREVER, ENDED = "9999999999", "1000"
QUEUED, NOT_QUEUED, ELSEWHERE = "; queued again", "and no checkpoint after", "another training has the run; not queued"


def job(folder: Path, says: list[str], end: str, **more: str) -> tuple[str, list[str]]:
    """The log of a job for which `largescale status` says one thing after the other, and the calls that it made."""
    (folder / "says").write_text("".join(f"{line}\n" for line in says))
    programs = {
        "largescale": 'head -n 1 says; grep -q complete <(head -n 1 says); code=$?; sed -i 1d says; exit "$code"',
        "scontrol": '[ "$1" = show ] || echo "scontrol $*" >>calls',
        "sleep": 'echo "sleep $*" >>calls',
        "squeue": "exit 1",
        "srun": 'echo "a store for each round: $TORCH_DISABLE_SHARE_RDZV_TCP_STORE; '
        '${SRUN_CPUS_PER_TASK:-its own} cores, $OMP_NUM_THREADS threads"; exit "${CODE:-3}"',
    }
    for name, text in programs.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    environ = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PREFLIGHT": "no",
        "SLURM_JOB_ID": "5",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_JOB_END_TIME": end,
        **more,
    }
    command = ["bash", ROOT / "launch" / "slurm" / "pretrain.sbatch", "recipe.yaml"]
    result = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert (folder / "says").read_text() == "", "it did not ask for all"
    calls = folder / "calls"
    return result.stdout + result.stderr, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    "says, end, expected",
    [
        ([NOT_STARTED, STOPPED], FOREVER, QUEUED),
        ([NOT_STARTED, STOPPED_FIRST], FOREVER, QUEUED),  # in the phase before the first step
        ([STOPPED, STOPPED_LATER], FOREVER, QUEUED),  # in the phase in which it had been stopped before
        ([STOPPED, STOPPED], FOREVER, NOT_QUEUED),  # it did not come that far
        ([STOPPED, STOPPED_LATER], ENDED, NOT_QUEUED),  # no job of this length gets through the phase
        ([NOT_STARTED, NOT_STARTED], FOREVER, NOT_QUEUED),
        ([STOPPED, GONE], FOREVER, NOT_QUEUED),
        ([NOT_STARTED, COMPLETE], FOREVER, "start 0: complete"),
    ],
)
def test_a_job_queues_again_where_it_got_on_or_was_stopped_in_a_phase(tmp_path, says, end, expected):
    log, calls = job(tmp_path, says, end)
    assert expected in log and "a store for each round: 1" in log
    assert ("scontrol requeue 5" in calls) == (expected == QUEUED)


@pytest.mark.parametrize(
    "says, end, expected",
    [
        ([NOT_STARTED, NOT_STARTED], FOREVER, QUEUED),
        ([STOPPED, STOPPED], FOREVER, QUEUED),
        ([NOT_STARTED, NOT_STARTED], ENDED, NOT_QUEUED),  # no job of this length joins
        (["", ""], FOREVER, NOT_QUEUED),  # that it cannot be read does not change
    ],
)
def test_a_job_whose_ranks_were_asked_to_stop_while_they_joined_queues_again(tmp_path, says, end, expected):
    log, calls = job(tmp_path, says, end, CODE="0")
    assert expected in log and ("scontrol requeue 5" in calls) == (expected == QUEUED)


def test_a_controller_that_does_not_answer_sets_no_limit(tmp_path):
    log, _ = job(tmp_path, [STOPPED, STOPPED_LATER], end="")  # a limit in the past would leave no time for the phase
    assert QUEUED in log


@pytest.mark.parametrize("later, expected", [(GONE, QUEUED), (RUNNING, ELSEWHERE), (COMPLETE, "start 0: complete")])
def test_a_run_that_seems_to_run_is_looked_at_again_after_its_lease(tmp_path, later, expected):
    log, calls = job(tmp_path, [NOT_STARTED, RUNNING, later], FOREVER)
    assert expected in log and calls[0] == "sleep 40"
    assert ("scontrol requeue 5" in calls) == (expected == QUEUED)


@pytest.mark.parametrize(
    "more, cores, threads",
    [
        ({}, "its own", 1),  # as with --cpus-per-gpu, beside which srun takes no number per task
        ({"SLURM_CPUS_PER_TASK": "64"}, 64, 64),
        ({"SLURM_CPUS_PER_TASK": "64", "RANKS_PER_NODE": "4"}, 64, 16),
        ({"SLURM_CPUS_PER_TASK": "2", "RANKS_PER_NODE": "4"}, 2, 1),
        ({"SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8"}, 64, 1),  # the others load images
        ({"SLURM_CPUS_PER_TASK": "64", "OMP_NUM_THREADS": "3"}, 64, 3),
        ({"SLURM_CPUS_PER_TASK": "64", "RANKS_PER_NODE": "cpu"}, 64, 1),  # torchrun counts them
        ({"SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8", "RANKS_PER_NODE": "gpu"}, 64, 1),
    ],
)
def test_a_job_uses_the_cores_that_it_has(tmp_path, more, cores, threads):
    log, _ = job(tmp_path, [NOT_STARTED, COMPLETE], FOREVER, **more)
    assert f"{cores} cores, {threads} threads" in log


def test_a_setup_may_read_what_is_not_set_and_fail_in_between(tmp_path):
    (tmp_path / "env.sh").write_text('test -n "$NOT_SET_BY_ANYONE"\nexport READ=yes\nfalse\n')
    log, _ = job(tmp_path, [NOT_STARTED, COMPLETE], FOREVER, SETUP=str(tmp_path / "env.sh"))
    assert "start 0: complete" in log and "unbound" not in log


@pytest.mark.parametrize("script", ["pretrain", "convert", "evaluate"])
def test_a_setup_does_not_take_the_arguments_of_the_job(tmp_path, script):
    (tmp_path / "env.sh").write_text('echo "setup has $#: $*"\nset -- its own\n')
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nprintf "srun: %s\\n" "$@"; exit 3\n')
    for name in ("largescale", "scontrol", "squeue"):
        (tmp_path / name).write_text("#!/usr/bin/env bash\n")
    for name in ("srun", "largescale", "scontrol", "squeue"):
        (tmp_path / name).chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SETUP": str(tmp_path / "env.sh"),
        "PREFLIGHT": "no",
        "SLURM_JOB_ID": "5",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "n0",
    }
    command = ["bash", ROOT / "launch" / "slurm" / f"{script}.sbatch", "first", "second", "a third"]
    result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert "setup has 0: " in lines, result.stdout + result.stderr
    given = [line.removeprefix("srun: ") for line in lines if line.startswith("srun: ")]
    assert [word for word in given if word in ("first", "second", "a third", "its")] == ["first", "second", "a third"]
