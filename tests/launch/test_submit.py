from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT

SUBMIT = "launch/slurm/submit"


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SUBMIT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_it_shows_what_it_would_submit():
    result = submit("configs/demo.yaml", "--nodes", "8", "--gpus", "4", "--time", "1-0", "--dry-run", "optim.lr=0.1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "sbatch --parsable --job-name=pretrain-demo --export=ALL\\,RANKS_PER_NODE=4 --nodes=1 --nodes=8 "
        "--gpus-per-node=4 --time=1-0 launch/slurm/pretrain.sbatch configs/demo.yaml optim.lr=0.1 \n"
    )


def test_gpus_may_be_of_a_type():
    shown = submit("configs/demo.yaml", "--gpus", "a100:4", "--cpus", "8", "--dry-run").stdout
    assert "RANKS_PER_NODE=4 " in shown and "--gpus-per-node=a100:4 " in shown


@pytest.mark.parametrize("name", ["swav/resnet50_800ep", "swav/resnet50_800ep.yaml"])
def test_a_recipe_goes_by_its_name(name):
    assert f"launch/slurm/pretrain.sbatch {name} " in submit(name, "--dry-run").stdout


def test_a_chain_is_one_job_after_the_other():
    lines = submit("configs/demo.yaml", "--chain", "3", "--dry-run", "--", "--qos=high").stdout.splitlines()
    assert len(lines) == 3 and all("MAX_REQUEUES=0" in line and "--qos=high" in line for line in lines)
    assert ["--dependency=afterany:JOB" in line for line in lines] == [False, True, True]


def test_cores_that_a_site_may_not_give_by_itself_are_spoken_of():
    assert "no --cpus" in submit("configs/demo.yaml", "--gpus", "8", "--dry-run").stderr
    assert not submit("configs/demo.yaml", "--gpus", "8", "--cpus", "64", "--dry-run").stderr
    assert not submit("configs/demo.yaml", "--gpus", "8", "--dry-run", "--", "--cpus-per-gpu=8").stderr
    assert not submit("configs/demo.yaml", "--dry-run").stderr


def test_a_conversion_takes_its_setup_from_the_environment_too(tmp_path):
    convert = ["launch/slurm/convert", str(tmp_path), "out", "--tasks", "2", "--dry-run"]
    alone = subprocess.run(convert, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "SETUP" not in alone
    (tmp_path / "env.sh").touch()
    named = subprocess.run([*convert, "--setup", tmp_path / "env.sh"], cwd=ROOT, capture_output=True, check=True).stdout
    assert named.count(f"--export=ALL,TASKS=2,SETUP={tmp_path}/env.sh".encode()) == 3


@pytest.mark.parametrize(
    "more, known, arrays",
    [(["keep"], True, 1), (["exact"], False, 2), (["exact"], True, 1), (["exact", "--update"], True, 2)],
)
def test_duplicates_that_are_known_take_no_round_of_their_own(tmp_path, more, known, arrays):
    (tmp_path / "out/plan").mkdir(parents=True)
    if known:
        (tmp_path / "out/plan/duplicates.bin").touch()
    convert = ["launch/slurm/convert", tmp_path, tmp_path / "out", "--tasks", "2", "--dry-run", "--", "--duplicates"]
    shown = subprocess.run([*convert, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("--array=0-1") == arrays


@pytest.mark.parametrize("ranks, expected", [("", "--nproc-per-node=2"), ("3", "--nproc-per-node=3")])
def test_gpus_that_torch_does_not_see_get_no_ranks(tmp_path, ranks, expected):
    programs = {
        "nvidia-smi": 'for i in 0 1 2 3 4 5 6 7; do echo "GPU $i"; done',
        "python": f'[ "$1" != -c ] || exec {sys.executable} "$@"; echo "$@"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "RANKS": ranks}
    command = ["bash", ROOT / "launch/local.sh", "configs/demo.yaml"]
    assert expected in subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout


def test_a_folder_of_something_else_is_no_slurm_in_a_box(tmp_path):
    (tmp_path / "precious").touch()
    command = [ROOT / "launch/slurm/box/stop"]
    environ = {**os.environ, "SLURM_BOX": str(tmp_path)}
    stop = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert stop.returncode == 2 and "set SLURM_BOX to a folder of its own" in stop.stderr
    assert (tmp_path / "precious").exists()
    (tmp_path / "precious").unlink()
    (tmp_path / "slurm.conf").write_text("ClusterName=box\n")
    assert subprocess.run(command, env=environ, check=False).returncode == 0 and not tmp_path.exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["configs/nowhere.yaml"], "no such configuration"),
        (["configs/demo.yaml", "--setup", "nowhere.sh"], "no such file (--setup)"),
        (["configs/demo.yaml", "--gpus", "a100"], "--gpus a100: expected a number, or TYPE:NUMBER"),
        (["configs/demo.yaml", "--chain", "0"], "expected a number of jobs"),
        (["configs/demo.yaml", "configs/demo.yaml"], "two configurations"),
        (["configs/demo.yaml", "--nodes"], "--nodes needs a value"),
        (["configs/demo.yaml", "--cores", "3"], "launch/slurm/submit CONFIG"),
        ([], "launch/slurm/submit CONFIG"),
    ],
)
def test_bad_input(arguments, expected):
    result = submit(*arguments)
    assert result.returncode == 2 and expected in result.stderr


NOT_BASH = (".in", ".py", ".pyc")
SCRIPTS = [path for path in sorted((ROOT / "launch").rglob("*")) if path.is_file() and path.suffix not in NOT_BASH]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
