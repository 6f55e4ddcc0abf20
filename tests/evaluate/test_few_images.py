"""Sets of which little can be said, and which are told so in a line: one image, one class, no labels, too few for k."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import largescale
import shards
from largescale.cli import main
from largescale.evaluate import clusters, knn, linear, linear_cached, low_shot, retrieval, spectrum
from largescale.evaluate.doubts import class_doubts
from largescale.evaluate.features import NETWORKS
from largescale.evaluate.protocols import PROTOCOLS
from shards.ground.errors import InputError
from tests.helpers.features import features
from tests.helpers.networks import narrow_resnet


@pytest.mark.parametrize(
    "measure, num_train, num_test, line",
    [
        (lambda *sets: linear.measure(*sets, linear.Settings()), 1, 5, "linear: 1 labelled training image; needs"),
        (lambda *sets: linear_cached.measure(*sets, linear_cached.Settings()), 1, 5, "linear-cached: 1 labelled"),
        (lambda *sets: low_shot.measure(*sets, low_shot.Settings()), 1, 5, "low-shot: 0.01 of 1 training images"),
        (lambda *sets: spectrum.measure(*sets, spectrum.Settings()), 1, 5, "spectrum: 1 training image; needs"),
        (lambda *sets: clusters.measure(*sets, clusters.Settings()), 3, 5, "3 training images for 4 clusters; lower"),
        (lambda *sets: retrieval.measure(sets[1], retrieval.Settings()), 5, 1, "no two of the 1 test images are"),
    ],
)
def test_too_few_images_are_said(measure, num_train, num_test, line):
    with pytest.raises(InputError, match=line):
        measure(features(num_train, 0), features(num_test, 1))


def test_a_bank_smaller_than_k_votes_as_a_whole_and_is_told():
    found = knn.measure(features(9, 0), features(5, 1), knn.Settings())
    assert found["num_neighbours"] == 9 and list(found["top1_by_k"]) == ["9"]
    assert "fewer than the k = 9 neighbours that vote" in found["doubts"][0]


def test_classes_that_are_missing_or_alone_are_named():
    train, test = features(40, 0), features(20, 1)
    of_a = replace(train, labels=torch.zeros(40, dtype=torch.int64))
    [line] = class_doubts(of_a, test)
    assert line.startswith("3 classes of the test images (b, ...) have no labelled training image")
    alone = replace(test, labels=torch.zeros(20, dtype=torch.int64))
    [line] = class_doubts(train, alone)
    assert line.startswith("all 20 test images are of one class (a): the figures say nothing")
    assert class_doubts(train, test) == []


@pytest.fixture(scope="module")
def unlabelled(sample_images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    torch.save(narrow_resnet().state_dict(), folder / "narrow.pth")
    shards.convert(sample_images / "test" / "bag", folder / "bags", workers=1)
    return folder


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "spectrum"])
def test_no_labels_are_said_by_every_protocol(unlabelled, protocol, capsys):
    bags = unlabelled / "bags"
    words = [f"evaluate.train_shards={bags}", f"data.eval_shards={bags}", "evaluate.resize=32", "evaluate.size=32"]
    place = str(unlabelled / "narrow.pth")
    assert main(["evaluate", protocol, place, *words, "data.workers=0", "evaluate.baselines=false"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    lines = (
        "its samples have no labels; make it with",
        "none of the 10 images of bags has a label there; name another member",
        "no sample has a ",
        "embeds no sounds",
        "no task whose answers are right or wrong",
        "clips of bags has a box there",
    )
    assert last.startswith("error: ") and any(line in last for line in lines)


def test_the_spectrum_needs_neither_labels_nor_test_images(unlabelled, capsys):
    words = [f"evaluate.train_shards={unlabelled / 'bags'}", "evaluate.resize=32", "evaluate.size=32", "data.workers=0"]
    words += ["evaluate.spectrum_images=9", "evaluate.spectrum_view_images=5", "data.crops=[{size: 32}]"]
    command = ["evaluate", "spectrum", str(unlabelled / "narrow.pth"), *words]
    assert main([*command, "evaluate.spectrum_views=1"]) == 2
    assert "evaluate.spectrum_views=1: expected 0 for none, or at least 2" in capsys.readouterr().err
    assert main([*command, "evaluate.spectrum_views=3"]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^alignment +[\d.]+ +[\d.]+ +-$", shown.out, re.MULTILINE), shown.out
    assert "test images" not in shown.out + shown.err
    [path] = unlabelled.glob("narrow.pth.evaluated/eval/results/spectrum-bags-*.json")
    record = json.loads(path.read_text())
    assert record["num_train"] == 9 and record["warnings"] == [] and set(record["results"]) == set(NETWORKS)
    found = record["results"]["pretrained"]
    assert found["num_views"] == 3 and found["num_view_images"] == 5 and 1 <= found["lidar"] < 5


def test_one_image_of_one_class_is_told(unlabelled, sample_images, tmp_path):
    folder = tmp_path / "one" / "bag"
    folder.mkdir(parents=True)
    shutil.copy(min((sample_images / "test" / "bag").iterdir()), folder / "0.png")
    shards.convert(tmp_path / "one", tmp_path / "shards", labels="folder", workers=1)
    words = [f"evaluate.train_shards={tmp_path / 'shards'}", f"data.eval_shards={tmp_path / 'shards'}"]
    words += ["evaluate.resize=32", "evaluate.size=32", "data.workers=0", "evaluate.baselines=false"]
    [record] = largescale.evaluate("knn", unlabelled / "narrow.pth", overrides=words)
    assert "all 1 test images are of one class (bag)" in record["warnings"][0]
    assert "all 1 test images are among the labelled training images" in record["warnings"][1]
