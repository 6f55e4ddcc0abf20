"""`largescale runs`: every run below a folder on a line of its own, damaged ones too.

Covers: largescale/evaluate/headline.py
"""

from __future__ import annotations

import json

import pytest

from largescale.cli import main
from largescale.evaluate.made_from import VERSION
from largescale.evaluate.results import write_result
from largescale.run.status import write_status
from largescale.run.table import runs_below

SHARDS = {"location": "/data/test", "name": "test", "fingerprint": "a"}


@pytest.fixture
def runs(tmp_path):
    """A complete run with a kNN accuracy, one that has stopped, a damaged one, and a folder that is no run."""
    good = tmp_path / "deep" / "good"
    write_status(good, "complete", 1500, 1500)
    row = {"step": 1499, "epoch": 2.0, "loss": 1.23456, "images_per_s": 4321.0}
    (good / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 15')
    (good / "former-1").mkdir()
    (good / "former-1" / "metrics.jsonl").write_text("")
    write_result(
        good,
        {
            "protocol": "knn",
            "settings": {},
            "checkpoint_step": 1500,
            "measured": "2026-01-01",
            "results": {"pretrained": {"top1": 0.8125}, "pixels": {"top1": 0.5}},
            "made_from": {"version": VERSION, "test_shards": SHARDS, "train_shards": SHARDS, "images": {}},
        },
    )
    write_status(tmp_path / "stopped", "stopped", 10, 100)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "status.json").write_text("{")
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_each_run_has_a_line_in_order(runs, capsys):
    assert main(["runs", str(runs)]) == 0
    head, bad, good, stopped = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "done", "loss", "images/s", "knn", "%", "age"]
    assert "damaged" in bad and "status.json" in bad
    assert good.split()[:8] == ["deep/good", "complete", "1,500", "of", "1,500", "100%", "1.2346", "4,321"]
    assert "81.2" in good
    assert stopped.split()[:6] == ["stopped", "stopped", "10", "of", "100", "10%"]


def test_json_has_what_the_table_shows(runs, capsys):
    assert main(["runs", str(runs), "--json"]) == 0
    bad, good, stopped = json.loads(capsys.readouterr().out)
    assert bad["path"] == "bad" and "status.json" in bad["damage"]
    assert good["accuracies"] == {"knn": 81.25} and good["loss"] == 1.23456 and good["step"] == 1500
    assert stopped["loss"] is None and stopped["damage"] == ""


def test_rounds_of_a_pruning_are_runs_of_their_own(runs):
    folder = runs / "deep" / "good" / "pruning"
    write_status(folder / "round-01", "complete", 5, 5)
    assert "deep/good/pruning/round-01" not in [row.path for row in runs_below(runs)]
    (folder / "pruning.json").write_text("{}")
    assert [row.path for row in runs_below(runs)][1:3] == ["deep/good", "deep/good/pruning/round-01"]


def test_a_damaged_result_or_metrics_file_costs_that_number_alone(runs):
    (runs / "deep" / "good" / "eval" / "knn.json").write_text("[]")
    for path in (runs / "deep" / "good" / "eval" / "results").iterdir():
        path.write_text(path.read_text().replace("0.8125", "0.9"))
    (runs / "deep" / "good" / "metrics.jsonl").write_bytes(b"\xff\x00[")
    good = runs_below(runs)[1]
    assert (good.state, good.accuracies, good.loss, good.damage) == ("complete", {}, None, "")


def test_a_run_itself_and_none_at_all(runs, capsys):
    assert [row.path for row in runs_below(runs / "stopped")] == ["."]
    assert main(["runs", str(runs / "notes")]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main(["runs", str(runs / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
