"""What comes of a pruning: its curve, files for others, and networks that labels train.

Covers: largescale/prune/page.py
"""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from largescale.cli import main
from largescale.prune import page
from largescale.prune.curve import Point, figure_of, measured_by, points_of, told
from tests.helpers.prunings import left, masks_of, state_of

pytestmark = pytest.mark.slow


def test_a_curve_reads_no_masks(run, pruned, monkeypatch):
    expected = [left(masks_of(pruned / name)) for name in ("round-01", "round-02")]
    monkeypatch.setattr("largescale.prune.curve.read_state", None)
    points = points_of(run, pruned)
    assert points[0].left == points[0].weights and [point.left for point in points[1:]] == expected


def test_what_only_the_run_was_measured_by_makes_no_curve():
    points = [
        Point(0, 8, 8, "complete", 1.0, {"linear": 60.0, "knn": 50.0}),
        Point(1, 4, 8, "complete", 1.0, {"linear": 58.0}),
    ]
    assert measured_by(points) == ["linear"]
    assert "58.0" in told(points) and "knn" not in told(points)


def test_the_page_draws_no_curves_of_other_runs(tmp_path, monkeypatch):
    points = [Point(0, 8, 8, "complete", 1.0, {"knn": 60.0}), Point(1, 4, 8, "complete", 1.0, {"knn": 58.0})]
    for name, of in (("pruning", "ours"), ("one-shot", "ours"), ("other", "theirs"), ("damaged", None)):
        (tmp_path / name).mkdir()
        record = {"version": 1, "of": of, "wish": {"rate": 0.5}, "settings": {"optim.lr": 1.0}}
        (tmp_path / name / "pruning.json").write_text(json.dumps(record) if of else "{")
        (tmp_path / name / "curve.json").write_text(json.dumps([vars(point) for point in points]))
    drawn = []
    monkeypatch.setattr(page, "points_of", lambda *_: points)
    monkeypatch.setattr(page, "figure_of", lambda name, curves: drawn.append(list(curves)) or figure_of(name, curves))
    page.write_page(tmp_path / "pruning" / "pruning.html", tmp_path / "run", tmp_path / "pruning")
    assert drawn == [["pruning", "one-shot"]]
    written = (tmp_path / "pruning" / "pruning.html").read_text()
    legend = written[written.index('<ul class="legend">') : written.index('<div class="grid">')]
    assert [part.partition("<")[0] for part in legend.split("</svg>")[1:]] == ["pruning", "one-shot"]


def test_no_legend_covers_the_curves():
    curves = {name: [Point(0, 8, 8, "complete", 1.0, {"knn": 60.0})] for name in ("pruning", "one-shot")}
    assert figure_of("knn", curves).axes[0].get_legend() is None


def test_the_weights_and_the_mask_are_exported(pruned, tmp_path, capsys):
    for name, format_name, mask in (
        ("own.safetensors", "safetensors", "own.mask.safetensors"),
        ("own.pt2", "torch_export", "own.pt2.mask.safetensors"),
    ):
        out = tmp_path / name
        assert main(["export", str(pruned / "round-02"), str(out), "--format", format_name]) == 0
        masks = safetensors.torch.load_file(tmp_path / mask)
        assert masks.keys() == {f"backbone.{key}" for key in masks_of(pruned / "round-02")}
    weights = safetensors.torch.load_file(tmp_path / "own.safetensors")
    assert all(not weights[key][~mask].any() and weights[key][mask].all() for key, mask in masks.items())
    moved = shutil.copytree(pruned / "round-02", tmp_path / "moved")
    (moved / "mask.safetensors").write_bytes((pruned / "round-01" / "mask.safetensors").read_bytes())
    config = moved / "checkpoints" / "step-00000006" / "progress.json"
    config.write_text(config.read_text().replace(str(pruned), "/not/there"))
    assert main(["export", str(moved), str(tmp_path / "other.safetensors"), "--format", "safetensors"]) == 2
    assert "not the mask that" in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()


def test_labels_train_what_is_left(pruned, tmp_path):
    out, masks = tmp_path / "labelled.safetensors", masks_of(pruned / "round-02")
    words = ["--protocol", "finetune", "evaluate.finetune_epochs=1"]
    assert main(["finetune", str(pruned / "round-02"), str(out), *words]) == 0
    found, before = safetensors.torch.load_file(out), state_of(pruned / "round-02")
    for name, mask in masks.items():
        [weight] = [value for key, value in found.items() if key.endswith(f"backbone.{name}")]
        assert not weight[~mask].any() and not torch.equal(weight, before[f"model.backbone.{name}"])
