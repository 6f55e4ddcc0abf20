"""A new run whose backbone starts from a file of weights, by the real command: what is taken, recorded and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from largescale.checkpoint import sharded, torchvision_layout
from largescale.checkpoint.folder import find_latest
from largescale.cli import main
from largescale.config import ModelConfig
from largescale.models.backbones import build_backbone
from tests.helpers.commands import ROOT

pytestmark = pytest.mark.slow

STILL = ["optim.lr=1e-30", "optim.warmup_epochs=0", "optim.weight_decay=0"]
"""A run whose weights stay where they start (BatchNorm statistics do not)."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A training file of SwAV's with the network of tests/tiny.yaml."""
    torch.manual_seed(5)
    backbone, _ = build_backbone(ModelConfig(backbone="resnet", stem="3x3s2", depths=[1, 1], width=8))
    state = {
        f"module.{torchvision_layout.name_of(backbone, key)}": value for key, value in backbone.state_dict().items()
    }
    path = tmp_path_factory.mktemp("weights") / "swav.pth.tar"
    torch.save({"epoch": 2, "state_dict": {**state, "module.prototypes.weight": torch.zeros(3, 2)}}, path)
    return path


@pytest.fixture
def pretrain(shard_folder, tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit code and what it said."""

    def run(recipe: str, *overrides: object, folder: str = "new") -> tuple[int, str]:
        capsys.readouterr()
        given = [f"data.shards={shard_folder}", "train.precision=fp32", f"run.dir={tmp_path / folder}"]
        code = main(["pretrain", str(ROOT / recipe), *given, *STILL, *map(str, overrides)])
        said = capsys.readouterr()
        return code, said.err + said.out

    return run


def state_of(run: Path) -> dict[str, Tensor]:
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint is not None
    state = {
        name: torch.zeros(shape) for name, shape in sharded.shapes(checkpoint).items() if name.startswith("model.")
    }
    sharded.load(checkpoint, state, no_dist=True)
    return state


def check_taken(state: dict[str, Tensor], weights: Path, prefix: str) -> None:
    """Statistics and their counters have moved; all else stays as it was in the file."""
    theirs = torch.load(weights, weights_only=True)["state_dict"]
    for name, value in state.items():
        if name.startswith(prefix) and "running_" not in name and "num_batches" not in name:
            short = name.removeprefix(prefix).replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
            for stage in (0, 1):
                short = short.replace(f"stages.{stage}.", f"layer{stage + 1}.")
            torch.testing.assert_close(value, theirs[f"module.{short}"], rtol=0, atol=1e-6)


def test_the_backbone_is_taken_recorded_and_needed_only_once(weights, pretrain, tmp_path):
    copy = Path(shutil.copy(weights, tmp_path / "copy.pth"))
    start = [f"model.weights={copy}", "method.freeze_prototypes_steps=2", "checkpoint.every_steps=1"]
    code, said = pretrain("tests/tiny.yaml", *start, "train.steps=2", "parallel.strategy=fsdp")
    assert code == 0
    assert f"model.weights={copy}: recognised as torchvision's ResNet under state_dict, of SwAV" in said
    assert "36 of 36 backbone tensors; left there: 1 others (state_dict.prototypes)" in said
    check_taken(state_of(tmp_path / "new"), weights, "model.backbone.")
    record = json.loads((tmp_path / "new" / "init.json").read_text())
    assert record["taken"] == 36 and record["weights"] == str(copy) and record["std"] == [0.228, 0.224, 0.225]
    assert len(record["sha256"]) == 64
    copy.unlink()
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "step-00000002")
    code, said = pretrain("tests/tiny.yaml", *start, "train.steps=2")
    assert code == 0 and "from step 1" in said
    code, said = pretrain("tests/tiny.yaml", "model.weights=other", *start[1:], "train.steps=2")
    assert code == 2 and f"model.weights was {copy} and is now other; set it back, or use another run.dir" in said


def test_a_teacher_starts_as_its_student(weights, pretrain, tmp_path):
    tiny = ["model.depths=[1,1]", "model.width=8", "train.global_batch=16", "train.steps=1", "method.queue=32"]
    code, said = pretrain("configs/small/mocov2.yaml", *tiny, f"model.weights={weights}", "data.workers=0")
    assert code == 0, said
    state = state_of(tmp_path / "new")
    check_taken(state, weights, "model.backbone.")
    check_taken(state, weights, "model.teacher.backbone.")


def test_what_cannot_be_taken_is_one_line(weights, pretrain, tmp_path):
    torn = tmp_path / "torn.pth"
    torn.write_bytes(weights.read_bytes()[:500])
    for overrides, says in (
        (
            [f"model.weights={weights}", "model.width=16"],
            "all 36 tensors are those of model.backbone=resnet model.stem=",
        ),
        ([f"model.weights={weights}", "model.norm=layer"], "not a resnet with model.norm=layer: "),
        (["model.weights=absent.pth"], "error: model.weights=absent.pth: no such file"),
        ([f"model.weights={torn}"], f"error: model.weights={torn}: not a whole file of torch.save"),
        ([f"model.weights={weights}", "init_from=x"], "expected none with init_from=x"),
        ([f"init_from={weights}"], f"a file; for the weights of a backbone use model.weights={weights}"),
    ):
        for print_only in ([], ["--print"]):
            code, said = pretrain("tests/tiny.yaml", *overrides, *print_only)
            assert code == 2 and said.count("\n") == 1 and says in said, said
    assert not (tmp_path / "new").exists()
    code, said = pretrain("tests/tiny.yaml", f"model.weights={weights}", "--print")
    assert code == 0 and "# weights: recognised as torchvision's ResNet under state_dict" in said


def test_another_normalisation_is_said(weights, pretrain):
    code, said = pretrain("tests/tiny.yaml", f"model.weights={weights}", "data.mean=[0.5,0.5,0.5]", "train.steps=1")
    assert code == 0 and "pass data.mean=[0.485,0.456,0.406] data.std=[0.228,0.224,0.225]" in said
