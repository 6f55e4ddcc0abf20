"""Exports in timm's names: by timm itself where it is installed, and by our own reader of its layout in any case.

Covers: largescale/checkpoint/huggingface.py, largescale/checkpoint/model_card.py
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from largescale.checkpoint import timm_layout, torchvision_layout
from largescale.checkpoint.export import export
from largescale.checkpoint.folder import open_checkpoint
from largescale.checkpoint.foreign import load_backbone
from largescale.checkpoint.huggingface import crop_share
from largescale.config import ModelConfig
from largescale.config.loading import config_of_values
from largescale.evaluate.extract import load_method
from largescale.evaluate.figures import figures_of
from largescale.evaluate.made_from import VERSION, images_stamp, weights_stamp
from largescale.evaluate.results import write_result
from largescale.models.backbones import build_backbone
from shards.ground.errors import InputError
from tests.helpers.checkpoints import config_of, save_checkpoint

TIMM = importlib.util.find_spec("timm") is not None
SMALL = ["evaluate.size=34", "evaluate.resize=50", "data.mean=[0.5,0.5,0.5]"]


@pytest.fixture(scope="module")
def regnet(tmp_path_factory):
    """A run with the smallest RegNet, one of those that timm has twice."""
    run = tmp_path_factory.mktemp("timm") / "run"
    config = config_of(["model.backbone=regnet_x_400mf", "model.stem=imagenet"], *SMALL)
    path = save_checkpoint(run, config, 3)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return run, images, load_method(config, open_checkpoint(path)).backbone(images)


def test_a_file_in_timms_names(regnet, tmp_path):
    run, images, features = regnet
    done = export(run, tmp_path / "out.safetensors", format_name="timm")
    assert done.checked.startswith(f"read again by largescale{' and timm' * TIMM}, ")
    assert done.metadata["architecture"] == "regnetx_004_tv" and "'" not in done.metadata["build"]
    assert set(load_file(done.path)) >= {"stem.conv.weight", "s1.b1.conv1.conv.weight", "s4.b12.conv3.bn.running_var"}
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(done.path).backbone(images), features, rtol=0, atol=1e-5)
    if TIMM:
        lines: dict = {}
        exec(done.metadata["build"], lines)
        lines["model"].load_state_dict(load_file(done.path), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(lines["model"].eval()(images), features, rtol=0, atol=1e-5)


RESULTS: list[tuple[str, dict, dict, dict]] = [
    ("knn", {}, {"top1": 0.75, "num_neighbours": 20}, {"top1": 0.5}),
    (
        "linear",
        {"metric": "top1", "metric_title": "top-1"},
        {"top5": 0.9, "top1": 0.8, "learning_rate": 0.3},
        {"top1": 0.4},
    ),
    (
        "retrieval",
        {"metric": "map", "metric_title": "mean average precision"},
        {"map": 0.25, "recall_at_1": 0.5, "num_queries": 9},
        {"map": 0.125},
    ),
    (
        "clusters",
        {"metric": "nmi", "metric_title": "NMI of k-means"},
        {"nmi": 0.5, "ami": 0.375, "ari": 0.25, "matched": 0.625, "num_clusters": 10},
        {"nmi": 0.25},
    ),
    (
        "spectrum",
        {"metric": "effective_rank", "metric_title": "effective rank", "metric_is_share": False},
        {"effective_rank": 23.5, "mean_share": 0.125, "alpha": 0.875, "num_images": 200},
        {"effective_rank": 2.0},
    ),
]


def test_a_folder_for_hugging_face_with_its_card(regnet, tmp_path):
    run, images, features = regnet
    checkpoint = open_checkpoint(run / "checkpoints/step-00000003")
    assert checkpoint is not None
    made_from = {
        "version": VERSION,
        "weights": weights_stamp(checkpoint),
        "images": images_stamp(config_of_values(checkpoint.progress["config"], "")),
        "test_shards": {"name": "flowers"},
        "train_shards": {"name": "meadows"},
    }
    for protocol, about, pretrained, untrained in RESULTS:
        record = {"protocol": protocol, "settings": {}, "checkpoint_step": 3, "measured": "2026-11-26", **about}
        results = {"pretrained": pretrained, "untrained": untrained}
        write_result(run, record | {"results": results, "made_from": made_from})
    out = tmp_path / "folder"
    done = export(run, out, format_name="huggingface", figures=figures_of(run))
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert done.checked.startswith(f"read again by largescale{' and timm' * TIMM}, ")
    told = json.loads((out / "config.json").read_text())
    assert told["architecture"] == "regnetx_004_tv" and told["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert math.floor(34 / told["pretrained_cfg"]["crop_pct"]) == 50, "as timm resizes"
    assert told["pretrained_cfg"]["input_size"] == [3, 34, 34] and told["largescale"]["step"] == "3"
    card = (out / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: timm\n")
        and "tags: [self-supervised, image-feature-extraction, timm]" in card
    )
    assert "| knn | flowers | top1 | 75.00% | 50.00% |" in card and checkpoint.content_hash in card
    for line in (
        "| linear | flowers | top-1 | 80.00% | 40.00% |\n| linear | flowers | top5 | 90.00% |  |",
        "| retrieval | flowers | mean average precision | 25.00% | 12.50% |",
        "| clusters | flowers | NMI of k-means | 50.00% | 25.00% |",
        "| clusters | flowers | ami | 37.50% |  |",
        "| clusters | flowers | matched | 62.50% |  |",
        "| spectrum | meadows (training images) | effective rank | 23.5 | 2 |",
        "| spectrum | meadows (training images) | mean_share | 12.50% |  |",
        "| spectrum | meadows (training images) | alpha | 0.875 |  |",
    ):
        assert line in card, line
    assert "learning_rate |" not in card and "num_" not in card.split("## What it is worth")[1].split("## Where")[0]
    found = load_backbone(out)
    assert found.mean == [0.5, 0.5, 0.5] and found.model.backbone == "regnet_x_400mf"
    if TIMM:
        import timm

        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        assert model.pretrained_cfg["mean"] in ((0.5, 0.5, 0.5), [0.5, 0.5, 0.5])
        with torch.no_grad():
            torch.testing.assert_close(model(images), features, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="is there already; remove it, or choose another folder"):
        export(run, out, format_name="huggingface")


def test_timm_resizes_as_evaluation_did():
    sizes = [(resize, size) for size in range(1, 450) for resize in range(size, 2 * size + 40)]
    shares = [json.loads(json.dumps(crop_share(resize, size))) for resize, size in sizes]
    assert [math.floor(size / share) for (_, size), share in zip(sizes, shares, strict=True)] == [
        resize for resize, _ in sizes
    ]
    assert all(abs(share * resize / size - 1) < 1e-15 for (resize, size), share in zip(sizes, shares, strict=True))
    assert crop_share(256, 224) == 0.875 and crop_share(96, 96) == 1
    if TIMM:
        from timm.data import create_transform

        for resize, size in [pair for pair in sizes if math.floor(pair[1] / (pair[1] / pair[0])) != pair[0]][::500]:
            first, *_ = create_transform((3, size, size), crop_pct=crop_share(resize, size)).transforms
            assert first.size == resize


def test_neither_format_needs_timm(regnet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    done = export(regnet[0], tmp_path / "out.safetensors", format_name="timm")
    assert done.checked.startswith("read again by largescale, ")


@pytest.mark.parametrize(
    "name", ["regnet_y_800mf", "regnet_y_8gf", "regnet_y_16gf", "regnet_y_256gf", "resnext50_32x4d", "wide_resnet50_2"]
)
def test_names_and_shapes_are_those_of_timm(name):
    config = ModelConfig(backbone=name)
    theirs = timm_layout.network_of(config)
    with torch.device("meta"):
        ours, _ = build_backbone(config)
    found = {
        timm_layout.name_of(torchvision_layout.name_of(ours, key)): value.shape
        for key, value in ours.state_dict().items()
    }
    assert len(found) == len(ours.state_dict())
    if TIMM:
        import timm

        with torch.device("meta"):
            expected = timm.create_model(theirs, num_classes=0).state_dict()
        assert found == {key: value.shape for key, value in expected.items()}


@pytest.mark.parametrize(
    "config, words",
    [
        (ModelConfig(backbone="resnet50w2"), "model.backbone=resnet50w2: timm has no such network; use --format torch"),
        (ModelConfig(backbone="regnet_y_10b"), "model.backbone=regnet_y_10b: timm has no such network"),
        (ModelConfig(backbone="resnet50", stem="3x3"), "model.stem=3x3: timm's resnet50 has no such stem"),
        (ModelConfig(backbone="regnet_y_400mf", stem="3x3"), "model.stem=3x3: timm's regnety_004 has no such stem"),
        (ModelConfig(backbone="resnet50", pool=2), "model.pool=2: timm's networks average their whole map; use"),
        (ModelConfig(backbone="resnet"), "timm has no ResNet with these depths and widths"),
    ],
)
def test_what_timm_cannot_hold_is_refused_by_name(config, words):
    with pytest.raises(InputError, match=re.escape(words)):
        timm_layout.network_of(config)
