"""`largescale init` from shards to a recipe that trains as it is.

Covers: largescale/propose/arguments.py, largescale/plan/arguments.py
"""

from __future__ import annotations

import json

import pytest

from largescale.cli import main
from largescale.config import load_config


def refused(capsys, *arguments: object) -> str:
    assert main(["init", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == ""
    return line


def test_bad_arguments_are_one_line_and_no_recipe(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(capsys, tmp_path / "missing", "--gpus", 0)
    assert "no manifest.json" in refused(capsys, tmp_path / "empty", "--gpus", 0)
    assert "--hours 0: expected above 0" in refused(capsys, tmp_path, "--hours", 0)
    assert "--hours nan: expected above 0" in refused(capsys, tmp_path, "--hours", "nan")
    assert "--method nothing: expected " in refused(capsys, tmp_path, "--method", "nothing", "--gpus", 0)
    assert "--gpu h7: expected " in refused(capsys, tmp_path, "--gpu", "h7")


def test_images_are_refused_where_a_method_needs_clips_or_sound(capsys, shard_folder):
    assert "holds images, but method.name=opn sees frames" in refused(
        capsys, shard_folder, "--method", "opn", "--gpus", 0
    )
    assert "no sample has sound" in refused(capsys, shard_folder, "--method", "avc", "--gpus", 0)


@pytest.mark.slow
def test_on_this_cpu_the_recipe_trains(capsys, tmp_path, shard_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(shard_folder), "--gpus", "0", "--hours", "0.2"]) == 0
    captured = capsys.readouterr()
    assert "training a few steps to measure the speed" in captured.err and "images/s, measured here" in captured.out
    (tmp_path / "my.yaml").write_text(captured.out)
    config = load_config("my.yaml")
    assert config.data.shards == str(shard_folder) and config.data.augment.hue == 0  # Fashion-MNIST is grey
    assert [group.size for group in config.data.crops] == [28, 16]
    assert config.data.mean[0] == pytest.approx(0.29, abs=0.1)
    assert main(["pretrain", "my.yaml", "train.steps=3", "run.log_every=1"]) == 0
    rows = [json.loads(line) for line in (tmp_path / config.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


@pytest.mark.slow
def test_for_a_gpu_of_another_machine_the_planner_is_asked(capsys, tmp_path, shard_folder):
    assert main(["init", str(shard_folder), "--gpu", "v100", "--hours", "1"]) == 0
    text = capsys.readouterr().out
    assert "by the planner a step needs " in text and "from data sheets, nothing was measured" in text
    (tmp_path / "my.yaml").write_text(text)
    config = load_config(tmp_path / "my.yaml")
    assert (config.model.backbone, config.model.stem) == ("resnet50", "3x3s2")
