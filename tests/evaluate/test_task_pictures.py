"""Pictures of what a task makes of images: kept by an evaluation, shown by the report.

Covers: largescale/report/gallery.py
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from largescale.cli import main
from largescale.config import load_config
from largescale.data.corpora import open_corpus
from largescale.data.views import Views
from largescale.evaluate import features, task_pictures
from largescale.methods.pictures import Pictures
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.sounding import RATE, half_silent_clips

MINI = ROOT / "tests/methods/mini/denoising.yaml"
COLUMNS = ["damaged", "restored", "image"]


def test_pictures_are_of_the_weights_that_are_measured(shard_folder, held_out_shards, tmp_path):
    run = tmp_path / "run"
    shared = [f"run.dir={run}", "train.precision=fp32", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    places = [f"data.shards={shard_folder}", f"data.eval_shards={held_out_shards}"]
    plain = [
        "evaluate.size=16",
        "evaluate.resize=20",
        "evaluate.baselines=false",
    ]  # pictures are of the size of views, whatever evaluation sees
    assert main(["pretrain", str(MINI), *shared, *places, *plain, "train.steps=4"]) == 0
    assert main(["report", str(run)]) == 0
    assert "What was hidden, and restored" in (run / "report.html").read_text()
    assert task_pictures.load(task_pictures.path_of(run)) is None

    assert main(["evaluate", "knn", str(run)]) == 0
    drawn = task_pictures.load(task_pictures.path_of(run))
    assert drawn is not None and drawn.made_from["columns"] == COLUMNS and drawn.made_from["weights"]["step"] == 4
    shapes = {tuple(column.shape) for column in drawn.columns}
    assert shapes == {(task_pictures.IMAGES, 3, 24, 24)}
    damaged, restored, images = (column.float() / 255 for column in drawn.columns)
    config = load_config(MINI, [*shared, *places])
    mean = torch.tensor(config.data.mean)[:, None, None]
    hidden = (damaged - mean).abs().amax(1) < 1 / 255
    assert 0.2 < hidden.float().mean() < 0.5
    assert float((restored - images).abs().mean()) > 0.01

    first = task_pictures.path_of(run).read_bytes()
    assert main(["evaluate", "knn", str(run), "evaluate.knn_neighbours=[3]"]) == 0
    assert task_pictures.path_of(run).read_bytes() == first
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count('<figure class="drawn">') == 3 * task_pictures.IMAGES
    assert "what the decoder makes of them. Random images of test, network of step 4." in page

    (run / "checkpoints" / "step-00000004").rename(tmp_path / "away")
    assert main(["evaluate", "knn", str(run)]) == 0
    again = task_pictures.load(task_pictures.path_of(run))
    assert again is not None and again.made_from["weights"]["step"] == 2
    assert torch.equal(again.columns[2], drawn.columns[2]) and not torch.equal(again.columns[1], drawn.columns[1])


def test_a_damaged_file_is_as_good_as_none(tmp_path):
    path = tmp_path / "pictures.safetensors"
    path.write_bytes(b"\x00" * 40)
    assert task_pictures.load(path) is None


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return half_silent_clips(tmp_path_factory.mktemp("clips"), 24)


def keep(run, folder) -> list[Views]:
    """Keep pictures by a method that hears; returns what it has been shown."""
    config = load_config(MINI.with_name("avol.yaml"), [f"method.sound.rate={RATE}"])
    shown: list[Views] = []

    def draw(views: Views) -> list[torch.Tensor]:
        shown.append(views)
        return [views.images[0]]

    corpus = open_corpus(str(folder), config.data)
    subject = SimpleNamespace(run_dir=run, config=config, shards=(corpus, corpus))
    networks = SimpleNamespace(method=SimpleNamespace(draw=draw), device=torch.device("cpu"))
    features._keep_pictures(subject, Pictures("", "", ("image",)), networks, torch.arange(24), {"version": 1})
    return shown


def test_a_method_that_hears_draws_of_clips_with_sound(clips, tmp_path):
    [views] = keep(tmp_path, clips)
    assert len(views.ids) == task_pictures.IMAGES and (views.ids % 2 == 1).all() and views.sounds is not None


def test_where_nothing_can_be_heard_nothing_is_drawn(clips, shard_folder, tmp_path, monkeypatch, caplog):
    def missing() -> None:
        raise InputError("sound needs soundfile")

    with caplog.at_level(logging.INFO):
        assert keep(tmp_path, shard_folder) == []
        monkeypatch.setattr(features, "soundfile", missing)
        assert keep(tmp_path, clips) == []
    assert [row.getMessage().partition(":")[0] for row in caplog.records] == ["no pictures of the task are kept"] * 2
    assert not task_pictures.path_of(tmp_path).exists()
