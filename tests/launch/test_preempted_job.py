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
        "srun": 'echo "${*:2}" >>calls; eval "${DOES:-}"; code=$(head -n 1 codes); sed -i 1d codes; exit "$code"',
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


VERIFY = "shards verify out --no-decode --workers 1"
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
@pytest.mark.parametrize(
    "does", ["", "rm -f out/manifest.json", "touch out/manifest.json"]
)  # --task 0/0 --force removes it
def test_what_a_job_finished_is_verified_without_decoding_it_again(tmp_path, arguments, there, does):
    (tmp_path / "out").mkdir()
    if there:
        (tmp_path / "out/manifest.json").touch()
    code, calls = job(tmp_path, "0 0", "convert.sbatch", *arguments, DOES=does)
    assert code == 0 and calls[1:] == [VERIFY][: "touch" in does]


@pytest.mark.parametrize("out, plan", [(["out"], "out/plan"), (["s3://out", "--work", "w"], "w/plan")])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("wrote", ["nothing", "plan", "manifest"])
def test_a_conversion_that_is_queued_again_goes_on_with_what_it_wrote_itself(tmp_path, out, plan, there, wrote):
    files = {"plan": tmp_path / plan / "plan.json", "manifest": tmp_path / out[0] / "manifest.json"}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
        if there:
            file.touch()
            os.utime(file, (1, 1))
    does = f"touch '{files[wrote]}'" if wrote in files else ""
    command = ["convert.sbatch", "raw", *out, "--force", "--shuffle", "3"]
    first = job(tmp_path, "0 143" if wrote == "manifest" else "143", *command, DOES=does)
    (tmp_path / "calls").unlink()
    code, calls = job(tmp_path, "0 0", *command, SLURM_RESTART_COUNT="1")
    convert = " ".join(["shards convert raw", out[0], "--workers 1", *out[1:]])
    again = {"nothing": f"{convert} --force --shuffle 3", "plan": f"{convert} --shuffle 3"}
    assert (first[0], code, calls) == (143, 0, [again.get(wrote, VERIFY.replace("out", out[0]))])
    assert not [*tmp_path.glob("*.began")]


@pytest.mark.parametrize(
    "more, task",
    [({}, "1/3"), ({"SLURM_ARRAY_TASK_COUNT": "2"}, ""), ({"SLURM_ARRAY_TASK_COUNT": "2", "TASKS": "9"}, "1/9")],
)
def test_tasks_that_are_run_again_have_the_parts_that_they_had(tmp_path, more, task):
    code, calls = job(tmp_path, "0", "convert.sbatch", "raw", "out", **(ARRAY | more))
    assert (code, calls) == ((0, [f"shards convert raw out --workers 1 --task {task}"]) if task else (2, []))
