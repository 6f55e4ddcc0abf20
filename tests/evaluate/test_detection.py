"""Detection in scenes whose boxes and masks are known.

Covers: largescale/evaluate/annotations.py, largescale/evaluate/annotated_masks.py,
largescale/evaluate/average_precision.py, largescale/evaluate/detector.py, largescale/evaluate/own_samples.py,
largescale/evaluate/read_ahead.py
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.canvases import annotated
from largescale.config import ModelConfig, load_config
from largescale.data.corpora import Corpus
from largescale.evaluate import detection
from largescale.evaluate.annotated_masks import mask_of
from largescale.evaluate.annotations import AnnotatedImages, Scene
from largescale.evaluate.average_precision import AveragePrecision
from largescale.evaluate.detection import measure
from largescale.evaluate.detector import Design, build_detector
from largescale.evaluate.members import MemberReader
from largescale.evaluate.training_state import Unfinished
from largescale.models.backbones import build_backbone, feature_map, in_sequence
from largescale.models.narrow import NarrowConv2d
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from tests.helpers.canvases import scenes
from tests.helpers.commands import ROOT
from tests.helpers.detection import member, small, trial_of, write
from tests.helpers.streams import overwrite

SIDE = 200


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory) -> tuple[Path, Path]:
    return scenes(tmp_path_factory.mktemp("few"), 16, 4)


def crafted(seed: int) -> tuple[list[Scene], list[dict[str, torch.Tensor]]]:
    """Images with objects of three categories, some of them crowds, and what is found: each twice, near or less so."""
    random, images, found = np.random.default_rng(seed), [], []
    for number in range(12):
        boxes, masks, categories, crowds = [], [], [], []
        for _ in range(number % 4):
            left, top = random.integers(0, SIDE - 120, 2)
            width, height = random.choice([(20, 15), (50, 60), (110, 100)])
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[top : top + height, left : left + width] = 1
            mask[top : top + 5, left : left + 5] = 0
            boxes.append([left, top, left + width, top + height])
            masks.append(mask)
            categories.append(int(random.choice([2, 5, 9])))
            crowds.append(random.random() < 0.2)
        truth = Scene(
            torch.zeros(3, SIDE, SIDE, dtype=torch.uint8),
            torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            torch.tensor(categories, dtype=torch.int64),
            torch.tensor(crowds, dtype=torch.bool),
            torch.tensor([float(mask.sum()) for mask in masks]),
            torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, SIDE, SIDE, dtype=torch.uint8),
        )
        near = truth.boxes.repeat(2, 1) + torch.from_numpy(random.normal(0, 4, (2 * len(boxes), 4))).float()
        near = near.clamp(0, SIDE)
        rolled = [np.roll(mask, random.integers(-6, 7, 2), (0, 1)) for mask in masks + masks]
        images.append(truth)
        found.append(
            {
                "boxes": near,
                "labels": torch.tensor([*categories, *categories], dtype=torch.int64),
                "scores": torch.from_numpy(random.random(len(near))).float(),
                "masks": torch.from_numpy(np.stack(rolled))[:, None].float()
                if rolled
                else torch.zeros(0, 1, SIDE, SIDE),
            }
        )
    return images, found


def by_pycocotools(images: list[Scene], found: list[dict[str, torch.Tensor]], kind: str) -> list[float]:
    """COCO's twelve figures, from its own files."""

    def lengths(mask: torch.Tensor) -> dict[str, Any]:
        return coco_masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    def wide(box: list[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    objects, results = [], []
    for number, (truth, said) in enumerate(zip(images, found, strict=True)):
        for place, box in enumerate(truth.boxes.tolist()):
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category_id": int(truth.categories[place]),
                    "bbox": wide(box),
                    "area": float(truth.areas[place]),
                    "iscrowd": int(truth.crowds[place]),
                    "segmentation": lengths(truth.masks[place]),
                }
            )
        for place, box in enumerate(said["boxes"].tolist()):
            one: dict[str, Any] = {
                "image_id": number,
                "category_id": int(said["labels"][place]),
                "score": float(said["scores"][place]),
            }
            what = {"bbox": wide(box)} if kind == "bbox" else {"segmentation": lengths(said["masks"][place, 0] >= 0.5)}
            results.append(one | what)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = {
            "info": {},
            "images": [{"id": number, "width": SIDE, "height": SIDE} for number in range(len(images))],
            "annotations": objects,
            "categories": [{"id": number} for number in (2, 5, 9)],
        }
        theirs.createIndex()
        measured = COCOeval(theirs, theirs.loadRes(results), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured.stats.tolist()


def test_average_precision_is_pycocotools_own():
    images, found = crafted(0)
    figures = AveragePrecision(masks=True)
    for number in (5, 0, 11, 1, 2, 3, 4, 6, 7, 8, 9, 10):  # in any order
        figures.add(number, found[number], images[number])
    got = figures.figures()
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        expected = by_pycocotools(images, found, kind)
        names = [f"{name}_{short}" for short in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]
        assert [got[one] for one in names] == pytest.approx(expected[:6], abs=1e-6)
        assert got[f"{name}_recall_100"] == pytest.approx(expected[8], abs=1e-6)
        assert 0.1 < got[f"{name}_ap"] < 0.9
        by_category = got[f"{name}_ap_by_category"]
        assert [*by_category] == ["2", "5", "9"]
        assert sum(by_category.values()) / 3 == pytest.approx(got[f"{name}_ap"], abs=1e-6)
    crowds = sum(int(one.crowds.sum()) for one in images)
    assert crowds and got["num_objects"] == sum(len(one.boxes) for one in images) - crowds and got["num_images"] == 12


def test_what_is_found_exactly_counts_whole_and_nothing_found_not_at_all():
    images, _ = crafted(1)
    exact, nothing = AveragePrecision(masks=False), AveragePrecision(masks=False)
    for number, one in enumerate(images):
        own = {"boxes": one.boxes, "labels": one.categories, "scores": torch.ones(len(one.boxes))}
        exact.add(number, own, one)
        nothing.add(number, {name: value[:0] for name, value in own.items()}, one)
    assert exact.figures()["box_ap"] == 1 and nothing.figures()["box_ap"] == 0
    assert "mask_ap" not in exact.figures()
    empty = AveragePrecision(masks=False)
    empty.add(0, {name: value[:0] for name, value in own.items()}, images[0])
    assert empty.figures() == {"num_images": 1, "num_objects": 0}


def test_scenes_are_read_as_they_were_made(few_scenes):
    trial = trial_of(few_scenes)
    images = AnnotatedImages(trial.train, trial.config, "json:annotations", masks=True)
    assert images.ids.tolist() == [*range(16)] and images.num_flat == 0
    masks = MemberReader(trial.train, "mask.png")
    for number in range(8):
        scene = images.scene(number)
        expected = torch.zeros(64, 64, dtype=torch.uint8)
        for mask, box, category in zip(scene.masks, scene.boxes.tolist(), scene.categories.tolist(), strict=True):
            expected[mask.bool()] = category + 1
            rows, columns = mask.nonzero(as_tuple=True)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        drawn = np.asarray(Image.open(io.BytesIO(masks.read(number))))
        assert torch.equal(expected, torch.from_numpy(drawn.copy()))
        assert scene.areas.tolist() == scene.masks.sum((1, 2)).tolist()


def test_masks_of_every_kind_are_pycocotools_own():
    random = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(one) for one in random.integers(1, 70, 2))
        mask = (random.random((height, width)) > random.random()).astype(np.uint8)
        if number % 2:
            mask[:] = 0
            mask[height // 3 :, width // 4 :] = 1
        theirs = coco_masks.encode(np.asfortranarray(mask))["counts"].decode()
        assert np.array_equal(mask_of({"size": [height, width], "counts": theirs}, height, width), mask)
        if mask.any():
            plain = annotated(mask.astype(bool))["segmentation"]
            assert np.array_equal(mask_of(json.loads(json.dumps(plain)), height, width), mask)
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]
    assert mask_of(square, 8, 8).sum() == 16 and mask_of(square, 8, 8)[1:5, 1:5].all()


GOOD = {"bbox": [1, 1, 4, 4], "category_id": 3, "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]]}


def lengths(counts: Any, size: list[int]) -> dict[str, Any]:
    return GOOD | {"segmentation": {"size": size, "counts": counts}}


CONFIG = load_config(ROOT / "tests/tiny.yaml", ["data.shards=nowhere"])


@pytest.mark.parametrize(
    "given, line",
    [
        (b"{", "key 0: json:annotations: not JSON"),
        (b"[" * 100_000, "key 0: json:annotations: not JSON"),
        (b"[]", r"expected an object with a field annotations, got \[\]"),
        (member(GOOD, field="objects"), "no sample has a field annotations in a member json"),
        (None, "no sample has a field annotations in a member json; name another one, evaluate.detection_annotations="),
        (b'{"annotations": {}}', r"expected a list of objects, got \{\}"),
        (member(GOOD, 7), "object 1: expected bbox and category_id, got 7"),
        (member(GOOD | {"bbox": [1, 1, 4]}), r"object 0: bbox=\[1, 1, 4\]: expected \[x, y, width, height\] in px"),
        (member(GOOD | {"bbox": [1, 1, float("nan"), 4]}), "expected .x, y, width, height. in px"),
        (member(GOOD | {"bbox": [1, 1, -4, 4]}), "expected .x, y, width, height. in px"),
        (member(GOOD | {"bbox": [1, 1, 40, 4]}), "object 0: its bbox is outside of the image, which is of 8 x 12 px"),
        (member(GOOD | {"bbox": [-3, 1, 4, 4]}), "object 0: its bbox is outside of the image"),
        (member(GOOD | {"category_id": -1}), "category_id=-1: expected a whole number from 0 to 65535"),
        (member(GOOD | {"category_id": 65536}), "category_id=65536: expected"),
        (member(GOOD | {"category_id": "dog"}), 'category_id="dog": expected'),
        (member(GOOD | {"category_id": True}), "category_id=true: expected"),
        (member(GOOD | {"iscrowd": 2}), "iscrowd=2: expected 0 or 1"),
        (member(GOOD | {"area": -1}), "area=-1: expected"),
        (member({"bbox": [1, 1, 4, 4], "category_id": 3}), "has no segmentation; Mask R-CNN needs one"),
        (member(GOOD | {"segmentation": [[1, 1, 5]]}), "expected polygons or run lengths"),
        (member(GOOD | {"segmentation": [[1, 1, 5, 1, 900, 5]]}), "its segmentation is outside of the image"),
        (member(lengths([1, 2], [12, 8])), "its run lengths do not add up to the 96 px"),
        (member(lengths([96, -1, 1], [12, 8])), "expected polygons or run lengths"),
        (member(lengths([96], [8, 12])), "segmentation of 12 x 8 px, its image of 8 x 12"),
        (member(lengths("0", [12, 8])), "its run lengths do not add up"),
        (member(lengths("", [12, 8])), "its run lengths do not add up"),
        (member(lengths("oooo", [12, 8])), "its run lengths end within a number"),
        (member(lengths("\u00e9!", [12, 8])), "no text of COCO's"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(tmp_path, given, line):
    corpus = Corpus(read_manifest(write(tmp_path / "a", [given], 8, 12)))
    with pytest.raises(InputError, match=line):
        AnnotatedImages(corpus, CONFIG, "json:annotations", masks=True).scene(0)


def test_rounding_crowds_and_objects_without_area_are_as_published_sets_have_them(tmp_path):
    objects = [GOOD | {"bbox": [4, 4, 4.5, 4.9], "iscrowd": 1}, GOOD | {"bbox": [1, 1, 0, 3]}, GOOD]
    folder = write(tmp_path / "a", [member(*objects), member(), None])
    images = AnnotatedImages(Corpus(read_manifest(folder)), CONFIG, "json:annotations", masks=False)
    assert (images.ids.tolist(), images.counts, images.num_flat) == ([0, 1], {3: 1}, 1)
    scene = images.scene(0)
    assert scene.boxes.tolist() == [[4, 4, 8, 8], [1, 1, 5, 5]] and scene.crowds.tolist() == [True, False]
    assert images.scene(1).boxes.shape == (0, 4) and scene.masks is None
    with pytest.raises(InputError, match="detection_annotations=cls: expected json:FIELD"):
        AnnotatedImages(Corpus(read_manifest(folder)), CONFIG, "cls", masks=False)


@pytest.mark.parametrize(
    "model, strides",
    [
        (ModelConfig(backbone="resnet18"), [4, 8, 16, 32]),
        (ModelConfig(backbone="regnet_y_400mf"), [4, 8, 16, 32]),
        (ModelConfig(backbone="resnet", depths=[1, 1], width=8, stem="3x3s2"), [2, 4]),
    ],
)
def test_resnets_and_regnets_give_maps_at_the_right_strides(model, strides):
    backbone, width = build_backbone(model)
    backbone.eval()
    image = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        assert torch.equal(in_sequence(backbone)(image), feature_map(backbone, image))
        design = Design("faster_rcnn", False, 8, 8.0, 16, 64, 128, [0.5] * 3, [0.2] * 3)
        detector = build_detector(backbone, 3, design, torch.device("cpu")).eval()
        maps = detector.backbone(image)
    assert [64 // one.shape[2] for one in maps.values()] == [*strides, 2 * strides[-1]]
    assert [128 // one.shape[3] for one in maps.values()] == [*strides, 2 * strides[-1]]
    assert {one.shape[1] for one in maps.values()} == {8}
    assert detector.rpn.anchor_generator.sizes == tuple((8 * stride,) for stride in [*strides, 2 * strides[-1]])
    kept = {one.data_ptr() for one in detector.backbone.body.parameters()}
    assert kept == {one.data_ptr() for one in backbone.parameters()}
    assert width == detector.backbone.fpn.inner_blocks[-1][0].in_channels
    assert any(isinstance(one, NarrowConv2d) for one in backbone.modules()) == (model.width == 8)


def test_a_training_changes_the_trunk_and_frozen_batchnorm_stays(few_scenes):
    for batchnorm, changes in (("synchronised", True), ("frozen", False)):
        trial = trial_of(few_scenes)
        trunk = trial.method.get_submodule(trial.method.encoder_name)
        conv, norm = trunk.stem[0].weight.clone(), trunk.stem[1]
        weight, mean = norm.weight.clone(), norm.running_mean.clone()
        found = measure(trial, small(detection_batchnorm=batchnorm))
        assert not torch.equal(conv, trunk.stem[0].weight)
        assert torch.equal(weight, norm.weight) != changes and torch.equal(mean, norm.running_mean) != changes
        assert (found["num_train"], found["num_test"], found["doubts"]) == (16, 4, []) and 0 <= found["box_ap"] <= 1


def test_one_that_is_killed_goes_on_and_finds_the_same_for_any_batch_of_evaluation(few_scenes, tmp_path, monkeypatch):
    settings = small(detection_model="mask_rcnn", detection_batch=8, detection_epochs=2)
    expected = measure(trial_of(few_scenes), settings)
    assert {"box_ap", "mask_ap", "mask_ap50"} <= {*expected}
    here, step, done = Unfinished(tmp_path / "unfinished", "x"), detection._step, []

    def killed(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(step(*arguments))
        return done[-1]

    monkeypatch.setattr(detection, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(replace(trial_of(few_scenes), unfinished=here), settings)
    monkeypatch.setattr(detection, "_step", lambda *arguments: done.append(step(*arguments)) or done[-1])
    again = trial_of(few_scenes, "evaluate.batch=3")
    assert measure(replace(again, unfinished=here), settings) == expected and len(done) == 4


def test_images_that_cannot_be_read_are_said(few_scenes, tmp_path):
    folders = tuple(shutil.copytree(folder, tmp_path / str(number)) for number, folder in enumerate(few_scenes))
    for folder in folders:
        overwrite(folder, 0, 1)
    found = measure(trial_of(folders), small())
    assert (found["num_train"], found["num_test"]) == (16, 3)
    assert found["doubts"] == [f"1 {what} images are left out: they cannot be read" for what in ("training", "test")]


def test_images_without_objects_take_part_and_sets_without_any_are_refused(few_scenes, tmp_path):
    bare = write(tmp_path / "bare", [member(), member()])
    some = write(tmp_path / "some", [member(GOOD), member(), None])
    for model in ("faster_rcnn", "mask_rcnn"):
        found = measure(trial_of((some, some)), small(detection_model=model))  # two images, fewer than a batch
        assert (found["num_train"], found["num_objects"]) == (2, 1)
        assert found["doubts"] == [
            "1 training images are left out: they have no json:annotations",
            "1 test images are left out: they have no json:annotations",
        ]
    for folders, key in (((bare, some), "evaluate.train_shards"), ((some, bare), "data.eval_shards")):
        with pytest.raises(InputError, match=f"{key}: no objects in json:annotations of its 2 images"):
            measure(trial_of(folders), small())
    other = write(tmp_path / "other", [member(GOOD | {"category_id": 8})])
    said = measure(trial_of((some, other)), small())["doubts"]
    assert said[-1] == "1 categories of the test images have no training object: 8"
    with pytest.raises(InputError, match="detection_batch=1: steps of one image"):
        measure(trial_of((some, some)), small(detection_batch=1))


@pytest.mark.parametrize("package", ["torchmetrics", "pycocotools"])
def test_a_missing_package_is_named(few_scenes, monkeypatch, package):
    for name in (package, "pycocotools.mask", "torchmetrics.detection"):
        if name.startswith(package):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"{package}.* is not installed; run pip install 'largescale\[detection\]'"):
        measure(trial_of(few_scenes), small())


def test_a_rate_that_diverges_is_said(few_scenes):
    with pytest.raises(InputError, match="lower the learning rate"):
        measure(trial_of(few_scenes), small(detection_rate=1e9, detection_epochs=3))
