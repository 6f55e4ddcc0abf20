from __future__ import annotations

import subprocess

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


@pytest.mark.parametrize("name", ["swav/resnet50_800ep", "swav/resnet50_800ep.yaml"])
def test_a_recipe_goes_by_its_name(name):
    assert f"launch/slurm/pretrain.sbatch {name} " in submit(name, "--dry-run").stdout


def test_a_chain_is_one_job_after_the_other():
    lines = submit("configs/demo.yaml", "--chain", "3", "--dry-run", "--", "--qos=high").stdout.splitlines()
    assert len(lines) == 3 and all("MAX_REQUEUES=0" in line and "--qos=high" in line for line in lines)
    assert ["--dependency=singleton" in line for line in lines] == [False, True, True]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["configs/nowhere.yaml"], "no such configuration"),
        (["configs/demo.yaml", "--setup", "nowhere.sh"], "no such file (--setup)"),
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
