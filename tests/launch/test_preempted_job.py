"""What jobs that evaluate and convert do, and when they queue again: their scripts, with programs in SLURM's place."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

ALL = ["largescale evaluate knn,linear runs/a", "largescale report runs/a"]


def job(folder: Path, codes: str, script: str, *arguments: str, **more: str) -> tuple[int, list[str]]:
    """The code of a job whose steps end with some codes, and what it called."""
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes.split()))
    programs = {
        "srun": 'echo "${*:2}" >>calls; ${WRITES:+touch "$WRITES"}; '
        'code=$(head -n 1 codes); sed -i 1d codes; exit "$code"',
        "scontrol": 'echo "scontrol $*" >>calls',
        "sleep": "true",
    }
    for name, text in programs.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", **more}
    command = ["bash", ROOT / "launch" / "slurm" / script, *arguments]
    result = subprocess.run(command, cwd=folder, env=environ, capture_output=True, check=False)
    calls = folder / "calls"
    return result.returncode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    "codes, more, expected",
    [
        ("0 0", {}, (0, ALL)),
        ("0 143", {}, (143, [*ALL[:2], "scontrol requeue 5"])),  # preempted
        ("0 143", {"SLURM_RESTART_COUNT": "100"}, (143, ALL[:2])),
        ("0 2", {}, (2, ALL[:2])),
        ("137", {}, (137, ALL[:1])),  # killed for its memory, as it would be again
    ],
)
def test_an_evaluation_that_was_preempted_queues_again(tmp_path, codes, more, expected):
    assert job(tmp_path, codes, "evaluate.sbatch", "runs/a", **more) == expected


ARRAY = {
    "SLURM_ARRAY_JOB_ID": "4",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_TASK_MAX": "2",
    "SLURM_ARRAY_TASK_COUNT": "3",
}


@pytest.mark.parametrize(
    "more, requeued",
    [
        ({}, ["scontrol requeue 5"]),
        (ARRAY, ["scontrol requeue 4_1"]),  # the number of an array's last task is that of all of them
        ({"SLURM_RESTART_COUNT": "100"}, []),
    ],
)
def test_a_conversion_that_was_preempted_queues_again(tmp_path, more, requeued):
    code, calls = job(tmp_path, "143", "convert.sbatch", "raw", "out", **more)
    assert code == 143 and calls[1:] == requeued and calls[0].startswith("shards convert raw out --workers 1")


@pytest.mark.parametrize("arguments", [["merge", "out"], ["raw", "out"]])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("writes", [False, True])
def test_what_a_job_finished_is_verified_without_decoding_it_again(tmp_path, arguments, there, writes):
    (tmp_path / "out").mkdir()
    if there:
        (tmp_path / "out/manifest.json").touch()
    more = {"WRITES": "out/manifest.json"} if writes else {}
    code, calls = job(tmp_path, "0 0", "convert.sbatch", *arguments, **more)
    assert code == 0 and calls[1:] == ["shards verify out --no-decode --workers 1"][:writes]


@pytest.mark.parametrize(
    "more, task",
    [({}, "1/3"), ({"SLURM_ARRAY_TASK_COUNT": "2"}, ""), ({"SLURM_ARRAY_TASK_COUNT": "2", "TASKS": "9"}, "1/9")],
)
def test_tasks_that_are_run_again_have_the_parts_that_they_had(tmp_path, more, task):
    code, calls = job(tmp_path, "0", "convert.sbatch", "raw", "out", **(ARRAY | more))
    assert (code, calls) == ((0, [f"shards convert raw out --workers 1 --task {task}"]) if task else (2, []))
