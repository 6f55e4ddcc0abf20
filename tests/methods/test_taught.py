"""`largescale distill`: a run like others, that goes on with its teacher alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from largescale.cli import main
from largescale.methods.taught import taught_by
from largescale.models.image_classifier import checksum
from tests.helpers.commands import ROOT
from tests.helpers.teachers import CLASSES, teacher, write_teacher

TINY_STUDENT = """
name: student
run: {log_every: 2}
data:
  workers: 0
  streams: 4
  shuffle_window: 32
  crops: [{num: 1, size: 28}]
model: {backbone: resnet, stem: 3x3s2, depths: [1, 1], width: 4}
method: {name: distillation}
optim: {name: adamw, lr: 0.01}
train: {global_batch: 16, steps: 6, precision: fp64}
checkpoint: {every_steps: 3, keep: 9}
"""


def test_what_a_teacher_sets():
    path = teacher()
    assert taught_by(path) == [
        f'method.teacher="{path}"',
        f'method.teacher_sha256="{checksum(path)}"',
        f"method.classes={json.dumps(CLASSES)}",
    ]


@pytest.fixture
def command(tmp_path: Path, shard_folder: Path) -> list[str]:
    (tmp_path / "student.yaml").write_text(TINY_STUDENT)
    return [str(tmp_path / "student.yaml"), f"data.shards={shard_folder}", f"run.dir={tmp_path / 'run'}"]


@pytest.mark.slow
def test_a_student_is_a_run_like_others(tmp_path, command, capsys):
    own = tmp_path / "teacher.safetensors"
    own.write_bytes(teacher().read_bytes())
    assert main(["distill", str(own), *command]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 5 and {"same_choice", "divergence", "teacher_entropy"} <= rows[-1].keys()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["method"]["teacher_sha256"] == checksum(own) and written["method"]["classes"] == CLASSES

    # Stopped in the middle, it ends as it would have; its own config.yaml will do, and the teacher may be moved.
    [last] = (tmp_path / "run" / "checkpoints").glob("step-*6")
    last.rename(tmp_path / "last")
    own.rename(tmp_path / "moved.safetensors")
    capsys.readouterr()
    config = str(tmp_path / "run" / "config.yaml")
    assert main(["pretrain", config]) == 2 and "teacher.safetensors: no such file" in capsys.readouterr().err
    assert main(["pretrain", config, f"method.teacher={tmp_path / 'moved.safetensors'}"]) == 0
    assert [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [
        row["loss"] for row in rows
    ]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out.safetensors"), "--head"]) == 0

    # Another teacher makes another run.
    last_of_run = next((tmp_path / "run" / "checkpoints").glob("step-*6"))
    last_of_run.rename(tmp_path / "again")
    write_teacher(own, seed=1)
    capsys.readouterr()
    assert main(["distill", str(own), *command]) == 2
    assert "method.teacher_sha256" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize(
    "words, expected",
    [
        (["nothing.safetensors", "small/distillation"], "nothing.safetensors: no such file"),
        ([str(ROOT / "Makefile"), "small/distillation"], "not a whole file of safetensors"),
        (["TEACHER", "small/swav"], "method.teacher is unknown for method swav; distillation"),
    ],
)
def test_mistakes_are_said_in_a_line(words, expected, capsys):
    assert main(["distill", *(str(teacher()) if word == "TEACHER" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_a_recipe_alone_names_the_command(shard_folder, capsys):
    assert main(["pretrain", "small/distillation", "--print", f"data.shards={shard_folder}"]) == 2
    said = capsys.readouterr().err
    assert "use `largescale distill TEACHER CONFIG`" in said and said.count("\n") == 1
