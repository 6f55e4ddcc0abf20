"""Several labels per image, against scikit-learn on the same features.

Covers: largescale/evaluate/label_lists.py
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import LinearSVC

import shards
from benchmarks.canvases import CLASSES
from largescale.cli import main
from largescale.data.corpora import Corpus
from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.label_lists import LabelLists
from largescale.evaluate.svm import Settings, eleven_points, measure
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from tests.helpers.images import image_bytes
from tests.helpers.networks import narrow_resnet

COSTS = [1.0, 10.0]


def by_hand(truth: np.ndarray, scores: np.ndarray) -> float:
    """VOC07's, as its devkit has it: precision and recall after each image, in the order of scores."""
    order = np.argsort(-scores)
    hits = np.cumsum(truth[order])
    recall, precision = hits / truth.sum(), hits / np.arange(1, len(truth) + 1)
    return sum(max(precision[recall >= step / 10 - 1e-12], default=0) / 11 for step in range(11))


def test_eleven_points_are_those_of_the_devkit():
    random = np.random.default_rng(0)
    for num in (3, 30, 200):
        truth = random.random(num) < 0.3
        truth[0] = True
        scores = random.random(num) + 0.3 * truth
        assert eleven_points(truth, scores) == pytest.approx(by_hand(truth, scores))


@pytest.fixture(scope="module")
def record(scene_folders, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("svm")
    torch.save(narrow_resnet().state_dict(), folder / "narrow.pth")
    places = [f"evaluate.train_shards={scene_folders[0]}", f"data.eval_shards={scene_folders[1]}"]
    sizes = ["evaluate.resize=64", "evaluate.size=64", "data.workers=0", "evaluate.baselines=false"]
    words = [*places, *sizes, f"evaluate.svm_costs={COSTS}"]
    assert main(["evaluate", "svm", str(folder / "narrow.pth"), *words]) == 0
    out = folder / "narrow.pth.evaluated"
    found = json.loads((out / "eval/svm.json").read_text())
    sets = [FeatureSet.load(out / f"eval/features/pretrained-{part}-all.safetensors") for part in ("train", "test")]
    return {**found, "sets": sets}


def test_figures_are_those_of_scikit_learn_on_the_same_features(record, scene_folders):
    train, test = record["sets"]
    assert (len(train), len(test), record["num_train"], record["num_test"]) == (160, 60, 160, 60)
    assert record["warnings"] == [] and record["metric"] == "map_11_points"
    lists = [LabelLists(Corpus(read_manifest(folder))) for folder in scene_folders]
    truths = [
        np.array([[name in labels for name in CLASSES] for labels in one.read("json:labels", part.ids)])
        for one, part in zip(lists, (train, test), strict=True)
    ]
    x, there = (
        part.features.numpy() / (np.linalg.norm(part.features, axis=1)[:, None] + 1e-5) for part in (train, test)
    )
    found, plain = record["results"]["pretrained"], []
    for number, name in enumerate(CLASSES):
        svm = LinearSVC(class_weight={1: 2, 0: 1}, dual=True, max_iter=2000, random_state=0)
        search = GridSearchCV(svm, {"C": COSTS}, scoring="average_precision", cv=StratifiedKFold(3))
        search.fit(x, truths[0][:, number].astype(int))
        scores = search.decision_function(there)
        plain.append(average_precision_score(truths[1][:, number], scores))
        one = found["by_class"][name]
        assert one["cost"] == search.best_params_["C"] and one["num_test"] == truths[1][:, number].sum()
        assert one["ap"] == pytest.approx(plain[-1], abs=2e-3)
        assert one["ap_11_points"] == pytest.approx(by_hand(truths[1][:, number], scores), abs=2e-3)
    assert found["map"] == pytest.approx(np.mean(plain), abs=2e-3)


def tar(folder: Path, members: list[dict[str, bytes]]) -> Corpus:
    """A shard folder of grey images with these members beside them."""
    folder.mkdir()
    with tarfile.open(folder / "a-000000.tar", "w") as file:
        for number, others in enumerate(members):
            for suffix, payload in {**others, "ppm": b"P5 2 2 255\n" + bytes([number] * 4)}.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(payload)
                file.addfile(info, io.BytesIO(payload))
    return Corpus(shards.index(folder, workers=1))


def test_lists_are_read_from_json_and_cls(tmp_path):
    corpus = tar(
        tmp_path / "a",
        [
            {"json": b'{"labels": ["b", 3]}', "cls": b"3, 7"},
            {"json": b'{"labels": []}', "cls": b'["a b", "c"]'},
            {"json": b'{"other": 1}', "cls": b"3"},
            {},
        ],
    )
    ids, lists = torch.arange(4), LabelLists(corpus)
    assert lists.read("json:labels", ids) == [{"b", "3"}, set(), None, None]
    assert lists.read("cls", ids) == [{"3", "7"}, {"a b", "c"}, {"3"}, None]


@pytest.mark.parametrize("way", ["folder", "convert", "index"])
def test_the_name_of_a_class_is_one_label_whatever_is_in_it(tmp_path, way):
    names, images = ["crane, bird", "crane, machine"], tmp_path / "images"
    if way == "folder":
        for number, name in enumerate(names):
            (images / name).mkdir(parents=True)
            (images / name / "0.png").write_bytes(image_bytes(40, 30, "PNG", seed=number))
    else:
        images.mkdir()
        with webdataset.TarWriter(str(images / "0.tar")) as writer:
            for number in range(2):
                image = image_bytes(40, 30, "PNG", seed=number)
                writer.write({"__key__": str(number), "png": image, "cls": str(number)})
    made = images if way == "index" else tmp_path / "shards"
    if way == "index":
        shards.index(made, class_names=names, workers=1)
    elif way == "convert":
        shards.convert(images, made, labels="cls", class_names=names, workers=1)
    else:
        shards.convert(images, made, labels="folder", workers=1)
    assert set(LabelLists(Corpus(read_manifest(made))).read("cls", torch.arange(2))) == {
        frozenset([name]) for name in names
    }


@pytest.mark.parametrize(
    "payload, source, line",
    [
        (b"{", "json:labels", r"a-000000.tar, key 0: json:labels: not JSON"),
        (b'{"labels": "dog"}', "json:labels", 'expected a list of names or numbers, got "dog"'),
        (b'{"labels": [[1]]}', "json:labels", r"got \[\[1\]\]"),
        (b'{"labels": [true]}', "json:labels", r"got \[true\]"),
        (b"{}", "txt", "expected json:FIELD, such as json:labels, or cls"),
        (b"{}", "json", "expected json:FIELD"),
        (b"{}", "json:labels", "no image has a label there; name another member"),
    ],
)
def test_what_is_no_list_is_named(tmp_path, payload, source, line):
    listed = (
        FeatureSet(torch.ones(1, 2), torch.tensor([-1]), torch.arange(1), ()),
        LabelLists(tar(tmp_path / "a", [{"json": payload}])),
    )
    with pytest.raises(InputError, match=line):
        measure(listed, listed, Settings(svm_labels=source))


def test_shards_without_such_lists_are_refused_before_anything_is_computed(tmp_path):
    lists = LabelLists(tar(tmp_path / "a", [{"json": b"{}"}, {"json": b'{"labels": [], "tags": ["a"]}'}]))
    lists.require("json:tags", "evaluate.svm_labels")
    with pytest.raises(InputError) as refusal:
        lists.require("json:labels", "evaluate.svm_labels")
    assert str(refusal.value) == (
        "evaluate.svm_labels=json:labels: none of the 2 images of a has a label there; name another member"
    )
    classes = LabelLists(tar(tmp_path / "b", [{"cls": b"3"}, {"cls": b"4"}]))
    classes.require("cls", "evaluate.svm_labels")
    with pytest.raises(InputError, match=r"they have classes, which evaluate\.svm_labels=cls takes"):
        classes.require("json:labels", "evaluate.svm_labels")


class Known(LabelLists):
    """Lists that are given."""

    def __init__(self, **lists: list[str]) -> None:
        self._lists = lists

    def read(self, source, ids):
        return [frozenset(text) for text in self._lists[source.removeprefix("json:")]]


def features(rows: list[list[float]]) -> FeatureSet:
    num = len(rows)
    return FeatureSet(torch.tensor(rows), torch.full((num,), -1), torch.arange(num), ())


def test_classes_that_cannot_be_measured_are_named_and_uncertain_images_do_not_count():
    rows = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]
    train = features(rows), Known(labels=["ac", "ac", "bc", "bc"], hard=[""] * 4)
    labels = ["b", "ac", "b", "bd"]  # the first looks like an a
    found = measure(train, (features(rows), Known(labels=labels)), Settings())
    assert set(found["by_class"]) == {"a", "b"} and found["num_classes"] == 2
    assert "2 of 4 classes (c, d) are not measured" in found["doubts"][0]
    assert found["by_class"]["a"]["ap"] == 0.5 and 0.5 < found["by_class"]["b"]["ap"] < 1
    assert found["map"] == (0.5 + found["by_class"]["b"]["ap"]) / 2
    test = features(rows), Known(labels=labels, hard=["ab", "", "", ""])
    sure = measure(train, test, Settings(svm_uncertain="json:hard"))
    assert sure["map"] == sure["map_11_points"] == 1 and sure["by_class"]["b"]["num_test"] == 2
