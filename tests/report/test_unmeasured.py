"""What a report says of a run that is not measured yet."""

from __future__ import annotations

import pytest

import shards
from largescale.evaluate.made_from import VERSION
from largescale.evaluate.results import write_result
from largescale.report import evaluation, images, verdict
from largescale.report.reported_run import read_runs
from largescale.report.unmeasured import needed
from tests.helpers.run_folders import make_run

SHARDS = {"location": "/data/test", "name": "test", "fingerprint": "a"}


@pytest.fixture
def unlabelled(sample_images, tmp_path):
    shards.convert(sample_images / "train" / "bag", tmp_path / "bags", workers=1)
    return tmp_path / "bags"


def said_of(path):
    [run] = read_runs([path])
    return verdict.section_of([run]), evaluation.section_of([run]), images.sections_of(run)


@pytest.mark.parametrize("key", ["evaluate.train_shards", "data.eval_shards"])
def test_of_images_without_labels_what_needs_none_is_named(key, unlabelled, shard_folder, tmp_path):
    path = make_run(tmp_path / "run", f"data.shards={shard_folder}", f"{key}={unlabelled}", fall=0.0)
    answers, learned, shown = said_of(path)
    assert f"Not measured yet: largescale evaluate spectrum {path}." in answers
    assert f"Measure it: largescale evaluate spectrum {path}." in answers
    assert "`largescale evaluate spectrum RUN` does it" in learned
    says = f"Needs labels, and {key}={unlabelled} has none: pass others to `largescale evaluate knn RUN`."
    assert says in shown and "Needs `largescale" not in shown
    assert "evaluate knn" not in answers + learned


def test_of_images_with_labels_or_that_cannot_be_seen_it_is_knn(shard_folder, tmp_path):
    for number, place in enumerate((shard_folder, "s3://nowhere/shards", tmp_path / "gone")):
        path = make_run(tmp_path / f"run{number}", f"data.shards={place}")
        answers, learned, shown = said_of(path)
        assert f"Not measured yet: largescale evaluate knn {path}." in answers
        assert "`largescale evaluate knn RUN` does it" in learned
        assert "Needs `largescale evaluate knn RUN`." in shown
        [run] = read_runs([path])
        assert needed(run.config) == "Needs `largescale evaluate knn RUN`."


def test_a_measurement_that_is_no_share_is_shown(unlabelled, shard_folder, tmp_path):
    path = make_run(tmp_path / "run", f"data.shards={shard_folder}", f"data.eval_shards={unlabelled}")
    write_result(
        path,
        {
            "protocol": "spectrum",
            "metric": "effective_rank",
            "metric_is_share": False,
            "settings": {},
            "checkpoint_step": 80,
            "measured": "2026-01-01",
            "results": {"pretrained": {"effective_rank": 12.3456}},
            "num_test": 100,
            "made_from": {
                "version": VERSION,
                "test_shards": SHARDS,
                "train_shards": SHARDS,
                "weights": {"step": 80},
                "images": {},
            },
        },
    )
    answers, learned, _ = said_of(path)
    assert "Not measured yet" not in answers + learned
    assert "12.3" in learned and "which gives no share of images told right" in answers
