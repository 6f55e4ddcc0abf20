"""A new run from another's weights: what is taken, what is recorded, and what is refused, by the real command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import Checkpoint, find_latest
from largescale.cli import main
from largescale.config import load_config
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.slow

TINY = str(ROOT / "tests" / "tiny.yaml")
MINI = ROOT / "tests" / "methods" / "mini"
SHORT = ["train.precision=fp32", "data.audit=false", "train.steps=2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, shard_folder) -> Path:
    """A complete run of two steps with checkpoints of both."""
    run = tmp_path_factory.mktemp("source") / "run"
    assert (
        main(
            [
                "pretrain",
                TINY,
                f"data.shards={shard_folder}",
                *SHORT,
                "checkpoint.every_steps=1",
                f"run.dir={run}",
                'data.eval_shards=""',
            ]
        )
        == 0
    )
    return run


@pytest.fixture
def pretrain(shard_folder, tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit code and what it said."""

    def run(*overrides: object, folder: str = "new") -> tuple[int, str]:
        capsys.readouterr()
        code = main(
            [
                "pretrain",
                TINY,
                f"data.shards={shard_folder}",
                *SHORT,
                f"run.dir={tmp_path / folder}",
                *map(str, overrides),
            ]
        )
        return code, capsys.readouterr().err

    return run


def latest(run: Path) -> Checkpoint:
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def weights(run: Path) -> dict[str, Tensor]:
    checkpoint = latest(run)
    shapes = sharded.shapes(checkpoint)
    state = {name: torch.zeros(shapes[name]) for name in shapes if name.startswith("model.")}
    sharded.load(checkpoint, state, no_dist=True)
    return state


STILL = ["optim.lr=1e-30", "optim.warmup_epochs=0", "optim.weight_decay=0", "method.freeze_prototypes_steps=2"]
"""A run whose weights stay where they start (BatchNorm statistics do not)."""


def test_weights_are_taken_and_the_start_is_recorded(source, pretrain, tmp_path):
    code, said = pretrain(f"init_from={source}", *STILL, "train.steps=1", "parallel.strategy=fsdp", "optim.name=adamw")
    before, after = weights(source), weights(tmp_path / "new")
    assert code == 0 and f"the weights of {source}/checkpoints/step-00000002: {len(before)} tensors" in said
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    # Statistics go on from the source's 2 steps of three crop groups each.
    assert int(after["model.backbone.stem.1.num_batches_tracked"]) == 3 * 3
    record = json.loads((tmp_path / "new" / "init.json").read_text())
    assert record["step"] == 2 and record["taken"] == len(before) and record["not_taken"] == []
    assert len(record["sha256"]) == 64 and record["init_from"] == str(source)
    assert latest(tmp_path / "new").progress["init"] == record
    assert load_config(tmp_path / "new" / "config.yaml").init_from == str(source)


def test_other_prototypes_are_said_and_stay_random(source, pretrain, tmp_path):
    _, said = pretrain(f"init_from={source}", *STILL, "train.steps=1", "method.prototypes=[12,7]")
    [line] = [line for line in said.splitlines() if "not taken from there" in line]
    assert "prototypes.heads.1.weight ([12, 8] there, [7, 8] here)" in line and line.count(" here)") == 1
    record = json.loads((tmp_path / "new" / "init.json").read_text())
    assert record["not_taken"] == ["prototypes.heads.1.weight"]
    torch.testing.assert_close(
        weights(tmp_path / "new")["model.prototypes.heads.0.weight"],
        weights(source)["model.prototypes.heads.0.weight"],
        rtol=0,
        atol=1e-6,
    )


@pytest.fixture(scope="module")
def of_a_teacher(tmp_path_factory, shard_folder) -> Path:
    """A run whose teacher, which lags behind its student, is what is evaluated."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert main(["pretrain", str(MINI / "dino.yaml"), f"data.shards={shard_folder}", *SHORT, f"run.dir={run}"]) == 0
    return run


@pytest.mark.parametrize("method", ["simclr", "mocov2", "dino"])
def test_what_is_evaluated_of_a_run_is_what_another_starts_from(method, of_a_teacher, shard_folder, tmp_path, capsys):
    run = tmp_path / "new"
    still = [one for one in STILL if not one.startswith("method.")]
    still += ["method.momentum=1"] if method != "simclr" else []
    recipe = [str(MINI / f"{method}.yaml"), f"data.shards={shard_folder}", *SHORT, *still, "train.steps=1"]
    assert main(["pretrain", *recipe, f"run.dir={run}", f"init_from={of_a_teacher}"]) == 0
    said = capsys.readouterr().err
    before, after = weights(of_a_teacher), weights(run)
    learnt = [name for name in after if name.startswith("model.backbone.") and name.endswith("weight")]
    assert any(not torch.equal(before[name], before[name.replace(".", ".teacher.", 1)]) for name in learnt)
    same = method == "dino"
    for name in learnt:
        in_teacher = name.replace(".", ".teacher.", 1)
        expected = before[name if same else in_teacher]
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)
        if in_teacher in after:
            torch.testing.assert_close(after[in_teacher], before[in_teacher], rtol=0, atol=1e-6)
    assert ("those of its teacher, which is what is evaluated there" in said) == (not same)
    record = json.loads((run / "init.json").read_text())
    assert record["of"] == ("all" if same else "teacher")
    assert not any(name.startswith("teacher.") for name in record["not_taken"])


def test_a_resumed_run_does_not_need_its_source(source, pretrain, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    start = f"init_from={copy}"
    assert pretrain(start, "checkpoint.every_steps=1")[0] == 0
    before = weights(tmp_path / "new")
    shutil.rmtree(copy)
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "step-00000002")
    code, said = pretrain(start)
    assert code == 0 and "from step 1" in said
    assert json.loads((tmp_path / "new" / "init.json").read_text())["init_from"] == str(copy)
    resumed = weights(tmp_path / "new")
    assert all(torch.equal(resumed[name], value) for name, value in before.items())
    code, said = pretrain("init_from=elsewhere")
    assert code == 2 and f"has already started, from {copy}, and continues from its own checkpoint" in said
    assert pretrain()[0] == 2  # its configuration says where it began; leaving that out would lose it


def test_a_checkpoint_may_be_named_and_a_damaged_one_is_passed_over(source, pretrain, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    shard = next((copy / "checkpoints" / "step-00000002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "step-00000001: " in pretrain(f"init_from={copy}", "train.steps=1", folder="a")[1]
    code, said = pretrain(f"init_from={copy}/checkpoints/step-00000002", folder="b")
    assert code == 2 and "bytes instead of" in said and said.startswith("error: init_from=")
    named = f"init_from={copy}/checkpoints/step-00000001"
    assert "starts from the weights of" in pretrain(named, "train.steps=1", folder="c")[1]


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["init_from=nothing"], "init_from=nothing: no such folder; pass the folder of a run that has saved"),
        (["init_from={tmp}"], ": no checkpoint there; pass the folder of a run"),
        (
            ["init_from={source}", "model.width=16"],
            ": has another backbone: 30 tensors differ, such as backbone.stages.0.0.bn1.bias; set model.width=8",
        ),
        # To be pasted into a shell, and without what shapes do not depend on.
        (["init_from={source}", "model.depths=[1,1,1]", "model.recompute_stages=[1]"], "; set model.depths=[1,1]\n"),
    ],
)
def test_what_cannot_be_taken_is_one_line(source, pretrain, tmp_path, overrides, says):
    code, said = pretrain(*(text.format(source=source, tmp=tmp_path) for text in overrides))
    assert code == 2 and said.count("\n") == 1 and says in said
    assert not (tmp_path / "new").exists()


def test_a_source_that_is_removed_while_it_is_read_is_one_line(source, pretrain, tmp_path, monkeypatch):
    """As a run does that goes on; once before its files are opened, once while they are read."""
    copy = tmp_path / "copy"
    for module, name in ((sharded, "shapes"), (sharded.dcp, "load")):
        read = getattr(module, name)

        def removed_before(*words: Any, read: Callable[..., Any] = read, **more: Any) -> Any:
            shutil.rmtree(copy)
            return read(*words, **more)

        shutil.copytree(source, copy)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, removed_before)
            code, said = pretrain(f"init_from={copy}")
        assert code == 2 and "step-00000002: removed while being read, since its run goes on; run the" in said


def test_a_complete_run_cannot_be_changed_but_says_what_works(source, pretrain, tmp_path, capsys):
    run = Path(shutil.copytree(source, tmp_path / "run"))
    code, said = pretrain("train.steps=3", folder="run")
    assert code == 2 and "cannot continue, train.steps was 2 and is now 3" in said
    assert (
        "model.width was 8 and is now 4; set it back, or use another run.dir"
        in pretrain("model.width=4", folder="run")[1]
    )
    assert main(["pretrain", str(run / "config.yaml")]) == 0  # a copy's configuration names the original
    assert f"says run.dir={source}, so the run continues there, not in {run}" in capsys.readouterr().err
    works = [word for word in said.split() if word.startswith(("init_from=", "run.dir="))]
    assert works == [f"init_from={run}", f"run.dir={run}-2"]
    code, said = pretrain("train.steps=3", *works, folder="run")
    assert code == 0 and f"{run}-2 is complete: 3 steps" in said


def test_what_may_change_is_recorded_in_a_complete_run(source, pretrain, tmp_path):
    run = Path(shutil.copytree(source, tmp_path / "run"))
    metrics = (run / "metrics.jsonl").read_bytes()
    assert pretrain("data.eval_shards=somewhere", folder="run")[0] == 0
    assert load_config(run / "config.yaml").data.eval_shards == "somewhere"
    assert (run / "metrics.jsonl").read_bytes() == metrics and latest(run).damage() == ""
