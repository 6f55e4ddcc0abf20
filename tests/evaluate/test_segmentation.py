"""Segmentation of scenes whose masks are known.

Covers: largescale/evaluate/masks.py, largescale/evaluate/stage_maps.py, largescale/evaluate/fcn.py
"""

from __future__ import annotations

import copy
import io
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

import shards
from largescale.config import ModelConfig, load_config
from largescale.data.corpora import Corpus
from largescale.evaluate import segmentation
from largescale.evaluate.extract import load_method
from largescale.evaluate.fcn import dilate
from largescale.evaluate.image_training import Trial
from largescale.evaluate.masks import Cut, MaskedImages, Pair
from largescale.evaluate.segmentation import Settings, intersections_over_unions, measure
from largescale.evaluate.training_state import Unfinished
from largescale.models.backbones import build_backbone, in_sequence
from largescale.models.narrow import NarrowConv2d
from shards.format.manifest import read_manifest
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.streams import overwrite


@pytest.fixture
def trial(scene_folders, tmp_path) -> Trial:
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={scene_folders[0]}"])
    config.evaluate.resize = config.evaluate.size = 48
    train, test = (Corpus(read_manifest(folder)) for folder in scene_folders)
    method = load_method(config, None)
    return Trial(config, method, train, test, str(scene_folders[0]), tmp_path / "splits", torch.device("cpu"))


def test_it_learns_more_than_the_background_and_leaves_the_trunk(trial):
    before = {name: value.clone() for name, value in trial.method.state_dict().items()}
    settings = Settings(segmentation_epochs=4, segmentation_rate=0.02, segmentation_stages=[1, 2])
    found = measure(trial, settings)
    assert (found["num_train"], found["num_test"], found["num_classes"]) == (160, 60, 11)
    assert 0.7 < found["iou_by_class"]["0"] < 1 and found["miou"] > 0.11  # background alone: 0.07
    assert found["doubts"] == []
    assert all(torch.equal(value, before[name]) for name, value in trial.method.state_dict().items())


FCN = {"segmentation_head": "fcn", "segmentation_fcn_width": 8}


def test_images_that_cannot_be_read_are_said(trial, tmp_path):
    folders = [
        shutil.copytree(one.manifest.root, tmp_path / f"{one is trial.train}") for one in (trial.train, trial.test)
    ]
    for folder in folders:
        overwrite(folder, 0, 3)
    train, test = (Corpus(read_manifest(folder)) for folder in folders)
    found = measure(replace(trial, train=train, test=test), Settings(segmentation_epochs=1))
    assert (found["num_train"], found["num_test"]) == (160, 59)
    assert found["doubts"] == [f"1 {what} images are left out: they cannot be read" for what in ("training", "test")]


def test_an_fcn_learns_and_trains_the_trunk(trial):
    before = {name: value.clone() for name, value in trial.method.state_dict().items()}
    found = measure(trial, Settings(**FCN, segmentation_fcn_epochs=2, segmentation_fcn_rate=0.1))
    assert 0.6 < found["iou_by_class"]["0"] < 1 and found["miou"] > 0.07
    after = trial.method.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {"backbone.stem.0.weight", "backbone.stem.1.running_mean"} <= {*changed}
    assert all(name.startswith("backbone.") for name in changed)
    assert any(isinstance(one, NarrowConv2d) for one in trial.method.modules())
    with pytest.raises(InputError, match="lower the learning rate"):
        measure(trial, Settings(**FCN, segmentation_fcn_epochs=1, segmentation_fcn_rate=1e9))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "regnet_y_400mf"])
def test_the_last_stage_of_an_fcn_is_dilated(name):
    body = in_sequence(build_backbone(ModelConfig(backbone=name))[0].eval())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        third = body[:-1](image)
        coarse = body[-1](third)
        dilate(body[-1])
        fine = body[-1](third)
    assert coarse.shape[2:] == (2, 3) and fine.shape[2:] == third.shape[2:] == (4, 6)
    kernels = [one for one in body[-1].modules() if isinstance(one, torch.nn.Conv2d) and one.kernel_size == (3, 3)]
    assert kernels and all(one.dilation == one.padding == (2, 2) and one.stride == (1, 1) for one in kernels)
    assert all(one.dilation == (1, 1) for one in body[-2].modules() if isinstance(one, torch.nn.Conv2d))


@pytest.mark.parametrize("head", [{}, FCN | {"segmentation_fcn_epochs": 1}])
def test_one_that_is_killed_goes_on_and_finds_the_same(trial, monkeypatch, head):
    settings, start = Settings(segmentation_epochs=1, **head), copy.deepcopy(trial.method.state_dict())
    expected = measure(trial, settings)
    trial = Trial(**{**vars(trial), "method": load_method(trial.config, None)})
    trial.method.load_state_dict(start)
    trial = Trial(**{**vars(trial), "unfinished": Unfinished(trial.scratch.parent / "unfinished", "x")})
    step, done = segmentation._step, []

    def killed(*arguments):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(step(*arguments))
        return done[-1]

    monkeypatch.setattr(segmentation, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(trial, settings)
    trial = Trial(**{**vars(trial), "method": load_method(trial.config, None)})
    monkeypatch.setattr(segmentation, "_step", lambda *arguments: done.append(step(*arguments)) or done[-1])
    assert measure(trial, settings) == expected and len(done) == 10


def test_intersection_over_union_is_scikit_learn_s():
    random = np.random.default_rng(0)
    truth, found = random.integers(0, 4, 5000), random.integers(0, 5, 5000)
    confusion = torch.zeros(6, 6, dtype=torch.int64)
    np.add.at(confusion.numpy(), (truth, found), 1)
    expected = jaccard_score(truth, found, labels=range(4), average=None)
    shares = intersections_over_unions(confusion)
    assert list(shares) == [0, 1, 2, 3] and list(shares.values()) == pytest.approx(expected)


def test_image_and_mask_are_cut_alike():
    mask = torch.arange(12 * 20, dtype=torch.int64).view(12, 20).fmod(255).to(torch.uint8)
    pair = Pair(mask.expand(3, -1, -1), mask)
    for cut in (Cut(12, 8), Cut(12, 8, (0.0, 1.0)), Cut(12, 8, (0.9, 0.2), flip=True), Cut(12, 12)):
        found = cut(pair)
        assert found.mask.shape == (cut.size, cut.size) and torch.equal(found.image[1], found.mask)
    assert torch.equal(Cut(12, 8)(pair).mask, mask[2:10, 6:14])
    assert torch.equal(Cut(24, 24)(pair).mask[::2, ::2], mask[:, 4:16])
    padded = Cut(12, 16, (0.0, 0.0))(pair)
    assert (padded.mask[12:] == 255).all() and (padded.image[:, 12:] == 0).all()
    assert torch.equal(padded.mask[:12], mask[:, :16])


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


GREY = png(np.zeros((8, 8), np.uint8))


@pytest.mark.parametrize(
    "mask, line",
    [
        (None, "no sample has a member mask.png; name another one, evaluate.segmentation_masks=MEMBER, or pack"),
        (b"no image", r"key 0: mask.png is not an image"),
        (png(np.zeros((8, 8, 3), np.uint8)), "mask.png is of kind RGB; expected grey or a palette"),
        (png(np.full((8, 8), 700, np.uint16)), "is of kind I;16; expected"),
        (png(np.zeros((8, 9), np.uint8)), "mask.png is of 9 x 8 px, its image of 8 x 8"),
        (GREY[:-30], "mask.png is not an image"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(trial, tmp_path, mask, line):
    folder = tmp_path / "a"
    folder.mkdir()
    with tarfile.open(folder / "a-000000.tar", "w") as file:
        for suffix, payload in (("png", GREY), *([("mask.png", mask)] if mask else [])):
            info = tarfile.TarInfo(f"0.{suffix}")
            info.size = len(payload)
            file.addfile(info, io.BytesIO(payload))
    corpus = Corpus(shards.index(folder, workers=1))
    with pytest.raises(InputError, match=line):
        MaskedImages(corpus, trial.config, "mask.png").pair(0)


def test_a_stage_that_is_not_there_is_named(trial):
    with pytest.raises(InputError, match=r"evaluate.segmentation_stages=\[5\]: expected stages from 1 to 2"):
        measure(trial, Settings(segmentation_stages=[5]))
