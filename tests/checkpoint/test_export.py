"""An exported backbone, loaded by a process that cannot import this project, gives the features of the run.

Covers: largescale/checkpoint/torchvision_layout.py, largescale/checkpoint/exported.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from largescale.checkpoint import torchvision_layout
from largescale.checkpoint.export import FORMATS, export
from largescale.checkpoint.exported import read_network
from largescale.checkpoint.folder import open_checkpoint
from largescale.checkpoint.foreign import load_backbone
from largescale.checkpoint.mask_file import hash_of, write_mask
from largescale.checkpoint.model_card import model_card
from largescale.cli import main
from largescale.config import ModelConfig, load_config
from largescale.evaluate.extract import load_method
from largescale.methods import METHODS
from largescale.models import selective_kernel
from largescale.models.backbones import _widths_on_the_host, build_backbone
from shards.ground.errors import InputError
from tests.helpers.checkpoints import OWN, config_of, save_checkpoint
from tests.helpers.commands import ROOT
from tests.methods.harness import mini

MODELS = {  # own ResNets of two kinds of block, torchvision's with a small stem, a RegNetY, a VGG; some with a grid
    "own": OWN,
    "bottleneck": [
        "model.backbone=resnet",
        "model.depths=[1,1,1]",
        "model.width=8",
        "model.block=bottleneck",
        "model.stem=imagenet",
    ],
    "resnet18": ["model.backbone=resnet18", "model.stem=3x3", "model.pool=3"],
    "regnet": ["model.backbone=regnet_y_400mf", "model.stem=imagenet", "model.pool=2"],
    "vgg": ["model.backbone=vgg16_bn", "model.stem=3x3s2", "model.pool=2"],
}

IN_PLAIN_TORCH = """
import sys
sys.modules["largescale"] = sys.modules["shards"] = None  # an import of either is an error
import torch
from safetensors import safe_open
from safetensors.torch import load_file
for name in sys.argv[1:]:
    with safe_open(f"{name}.safetensors", framework="pt") as file:
        about = file.metadata()
    lines = {}
    exec(about["build"], lines)
    model = lines["model"]
    model.load_state_dict(load_file(f"{name}.safetensors"), strict=True)
    expected = load_file(f"{name}.expected")
    with torch.no_grad():
        features = model.eval()(expected["images"])
    if about["head"] == "none":
        assert features.shape[1] == int(about["num_features"])
    difference = float((features - expected["features"]).abs().max())
    assert expected["features"].std() > 0.01 and difference <= 1e-6, (name, difference)
assert sys.modules["largescale"] is None
"""


def python_of_the_page() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL)


def in_plain_torch(code: str, folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_plain_torch_gets_the_features_of_the_run_and_the_page_loads_a_file(tmp_path):
    generator, heads = torch.Generator().manual_seed(0), {}
    for name, model in MODELS.items():
        config = config_of(model)
        path = save_checkpoint(tmp_path / name, config, 7)
        images = torch.randn(2, 3, 64, 64, generator=generator)
        checkpoint = open_checkpoint(path)
        with torch.no_grad():
            method = load_method(config, checkpoint)
            features = method.backbone(images)
            embeddings = method.projection(features)
        scale = features.abs().max()  # the bound is for features of order 1
        assert scale < 1e3, scale
        done = export(tmp_path / name, tmp_path / f"{name}.safetensors")
        assert done.metadata["weights"] == checkpoint.content_hash and done.metadata["step"] == "7"
        save_file({"images": images, "features": features}, tmp_path / f"{name}.expected")
        heads[name] = embeddings
    # One of them again with its head, in the place of torchvision's classifier.
    done = export(tmp_path / "own", tmp_path / "head.safetensors", head=True)
    assert done.metadata["head"] == "projection" and "model.fc = torch.nn.Sequential(" in done.metadata["build"]
    images = load_file(tmp_path / "own.expected")["images"]
    save_file({"images": images, "features": heads["own"]}, tmp_path / "head.expected")
    blocks = python_of_the_page()
    save_checkpoint(tmp_path / "page", config_of(["model.backbone=resnet18", "model.stem=imagenet"]), 4)
    export(tmp_path / "page", tmp_path / "backbone.safetensors")
    told = in_plain_torch("\n".join([IN_PLAIN_TORCH, blocks[0], blocks[1]]), tmp_path, *MODELS, "head")
    assert told.startswith("torch.Size([2, 512]) 4\n") and "torchvision.models.resnet18()" in told


@pytest.mark.parametrize(
    "backbone",
    [
        "resnet50",
        "wide_resnet50_2",
        "resnext50_32x4d",
        "resnet50w2",
        "resnet50w5",
        "regnet_x_400mf",
        "regnet_y_16gf",
        "regnet_y_64gf",
        "regnet_y_10b",
        "vgg16_bn",
    ],
)
@pytest.mark.parametrize("stem", ["imagenet", "3x3s2", "3x3"])
def test_names_and_shapes_are_those_of_the_lines_that_build_it(backbone, stem):
    config = ModelConfig(backbone=backbone, stem=stem)
    with torch.device("meta"):
        ours, _ = build_backbone(config)
    found = {torchvision_layout.name_of(ours, name): value.shape for name, value in ours.state_dict().items()}
    stem_width = next(m for m in ours.modules() if isinstance(m, torch.nn.Conv2d)).out_channels
    lines: dict = {}
    with torch.device("meta"), _widths_on_the_host():
        exec(torchvision_layout.build_lines(config, stem_width), lines)
    expected = {name: value.shape for name, value in lines["model"].state_dict().items() if not name.startswith("fc.")}
    assert found == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Steps 5 (float64) and 10 of a run whose shards are not there."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    for step, precision in ((5, "fp64"), (10, "fp32")):
        save_checkpoint(folder, config_of(MODELS["own"], f"train.precision={precision}"), step, seed=step)
    return folder


def test_the_newest_or_the_step_that_is_asked_for_is_exported(run, tmp_path):
    newest, older, again = (export(run, tmp_path / f"{step}.safetensors", step=step) for step in (None, 5, 10))
    assert newest.path.read_bytes() == again.path.read_bytes() != older.path.read_bytes()
    assert (newest.metadata["step"], older.metadata["step"]) == ("10", "5")
    tensors = load_file(older.path)
    assert {value.dtype for value in tensors.values()} == {torch.float32, torch.int64}
    stored = load_method(
        config_of(MODELS["own"], "train.precision=fp64"), open_checkpoint(run / "checkpoints/step-00000005")
    ).backbone.state_dict()
    assert torch.equal(tensors["layer2.1.bn2.weight"], stored["stages.1.1.bn2.weight"])
    with safe_open(newest.path, framework="pt") as file:
        about = file.metadata()
    config = json.loads(about["config"])
    assert config["model.width"] == 8 and "run.dir" not in config
    assert json.loads(about["mean"]) == config["data.mean"] == [0.485, 0.456, 0.406]


def test_what_cannot_be_exported_is_a_line_and_leaves_no_file(run, tmp_path):
    out = tmp_path / "out.safetensors"
    for arguments, words in (
        ({"step": 7}, "no checkpoint of step 7; there are 10, 5"),
        (
            {"format_name": "tim"},
            "--format=tim: expected one of torchvision, timm, safetensors, huggingface, onnx, torch_export",
        ),
        (
            {"format_name": "timm"},
            "model.backbone=resnet: timm has no ResNet with these depths and widths; use --format",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            export(run, out, **arguments)
    with pytest.raises(InputError, match="expected an output file ending in"):
        export(run, tmp_path)
    with pytest.raises(InputError, match="no whole checkpoint"):
        export(tmp_path / "nothing", out)
    deep = tmp_path / "deep"
    save_checkpoint(deep, config_of(["model.depths=[1,1,1,1,1]", "model.width=4"]), 1)
    with pytest.raises(InputError, match="has 4 stages, this backbone has 5"):
        export(deep, out)
    alexnet = tmp_path / "alexnet"
    save_checkpoint(alexnet, config_of(["model.backbone=alexnet_bn", "model.stem=3x3", "model.sobel=true"]), 1)
    with pytest.raises(InputError, match="torchvision has no Sobel filter before a network; use --format safetensors"):
        export(alexnet, out)
    own = export(alexnet, tmp_path / "own.safetensors", format_name="safetensors")
    assert "read again by largescale" in own.checked
    with pytest.raises(InputError, match="has 4 stages, this backbone has 5"):
        export(deep, tmp_path / "new" / "file.safetensors")
    assert not list(tmp_path.glob("*out*")) and not (tmp_path / "new").exists()


def test_layer_normalisation_is_exported_where_it_has_a_place(tmp_path):
    """The file says which normalisation it is of; a network with the other one is a line."""
    run = tmp_path / "run"
    save_checkpoint(run, mini("cpc", "train.precision=fp32"), 1)
    done = export(run, tmp_path / "own.safetensors", format_name="safetensors")
    assert load_backbone(done.path).model.norm == "layer"
    with pytest.raises(InputError, match=r"own\.safetensors: not a resnet: .* tensors differ: bn1\.running_mean"):
        load_backbone(done.path, mini("cpc", "model.norm=batch").model)
    assert export(run, tmp_path / "graph.pt2", format_name="torch_export").checked
    for format_name, network in (("torchvision", "torchvision"), ("timm", "timm")):
        with pytest.raises(InputError, match=f"^model.norm=layer: {network}'s networks have BatchNorm; use --format"):
            export(run, tmp_path / "other.safetensors", format_name=format_name)
    assert not (tmp_path / "other.safetensors").exists()


def test_selective_kernels_are_exported_where_they_have_a_place(tmp_path, monkeypatch):
    monkeypatch.setitem(selective_kernel.DEPTHS, 50, [1, 1])  # not the 35 million variables of four stages
    run, config = tmp_path / "run", config_of(["model.backbone=resnet50_sk"])
    save_checkpoint(run, config, 1)
    done = export(run, tmp_path / "own.safetensors", format_name="safetensors", head=True)
    found = load_backbone(done.path, config.model)
    state = load_method(config, open_checkpoint(run / "checkpoints/step-00000001")).backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.backbone.state_dict().items())
    assert export(run, tmp_path / "graph.pt2", format_name="torch_export").checked
    for format_name in ("torchvision", "timm", "huggingface"):
        with pytest.raises(InputError, match=r"^model.backbone=resnet50_sk: .* has no .*; use --format"):
            export(run, tmp_path / "other.safetensors", format_name=format_name)
    assert not (tmp_path / "other.safetensors").exists()


def test_masks_stay_beside_no_weights_that_have_none(run, tmp_path):
    masks = {"stages.0.0.conv1.weight": torch.ones(8, 8, 3, 3, dtype=torch.bool)}
    write_mask(tmp_path / "masks", masks, {})
    config = config_of(MODELS["own"], f"model.mask={tmp_path / 'masks'}")
    pruned = tmp_path / "pruned"
    save_checkpoint(pruned, config, 4, mask={"sha256": hash_of(masks)})
    out, mask = tmp_path / "out.safetensors", tmp_path / "out.mask.safetensors"
    export(pruned, out)
    assert load_file(mask).keys() == {"layer1.0.conv1.weight"}
    export(pruned, tmp_path / "out.pt2", format_name="torch_export")
    of_graph = tmp_path / "out.pt2.mask.safetensors"
    assert load_file(of_graph).keys() == {"backbone.stages.0.0.conv1.weight"}
    assert load_file(mask).keys() == {"layer1.0.conv1.weight"}, "each has its own"
    export(run, tmp_path / "out.pt2", format_name="torch_export")
    assert mask.exists(), "it is of the weights beside"
    assert not of_graph.exists()
    export(run, out)
    assert not mask.exists()
    write_mask(mask, masks, {"by": "somebody else"})
    export(run, out)
    assert mask.exists()


def test_what_gives_other_features_when_read_again_is_not_kept(run, tmp_path, monkeypatch):
    def without_mercy(network, path):
        told = FORMATS["torchvision"](network, path)
        tensors = load_file(path)
        save_file({name: value * 2 if name == "conv1.weight" else value for name, value in tensors.items()}, path)
        return told

    monkeypatch.setitem(FORMATS, "safetensors", without_mercy)
    with pytest.raises(InputError, match="largescale computes other features from it"):
        export(run, tmp_path / "out.safetensors", format_name="safetensors")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_the_error_names_the_file_that_was_asked_for(run):
    with pytest.raises(OSError) as error:
        export(run, Path("/proc/out.safetensors"))
    assert error.value.filename == "/proc/out.safetensors"


def test_own_names_can_be_started_from_and_hold_any_depth(tmp_path):
    config = config_of(["model.depths=[1,1,1,1,1]", "model.width=4"])
    path = save_checkpoint(tmp_path / "deep", config, 1)
    done = export(tmp_path / "deep", tmp_path / "deep.safetensors", format_name="safetensors", head=True)
    found = load_backbone(done.path)
    assert found.model.depths == [1, 1, 1, 1, 1] and found.mean == config.data.mean
    state = load_method(config, open_checkpoint(path)).state_dict()
    tensors = load_file(done.path)
    assert torch.equal(tensors["projection.0.weight"], state["projection.0.weight"])
    assert all(torch.equal(value, state[f"backbone.{key}"]) for key, value in found.backbone.state_dict().items())


def test_the_command_says_what_it_checked_and_writes_a_card(run, tmp_path, capsys):
    (run / "config.yaml").touch()
    card = tmp_path / "card.md"
    assert main(["export", str(run), str(tmp_path / "out.safetensors"), "--head", "--card", str(card)]) == 0
    assert "read again by largescale, features equal to 0e+00" in capsys.readouterr().out
    text = card.read_text()
    assert (
        text.startswith("---\npipeline_tag:")
        and "timm" not in text
        and "license: unknown" in text
        and "Not measured yet" in text
        and "pixels (bilinear, antialiased), cropped to" in text
    )
    assert 'load_file("out.safetensors")' in text and sorted(path.name for path in tmp_path.iterdir()) == [
        "card.md",
        "out.safetensors",
    ]


@pytest.mark.parametrize("method, labels", [("swav", False), ("paws", True), ("distillation", True)])
def test_a_card_says_whether_labels_were_used(run, method, labels):
    network = read_network(run, None, head=False)
    config = replace(network.config, method=METHODS[method].Settings(name=method))
    text = model_card(replace(network, config=config), "", (), in_timm=False)
    assert ("from pretraining that uses labels\n" in text) == labels
    assert (
        ("from self-supervised pretraining without labels\n" in text) == ("tags: [self-supervised," in text) != labels
    )


def test_a_damaged_checkpoint_is_passed_over_or_refused(tmp_path, caplog):
    for step in (1, 2):
        path = save_checkpoint(tmp_path / "run", config_of(MODELS["own"]), step)
    piece = next(path.glob("*.safetensors"))
    piece.write_bytes(piece.read_bytes()[:-1])
    assert export(tmp_path / "run", tmp_path / "out.safetensors").metadata["step"] == "1"
    assert "taking the one before" in caplog.text
    with pytest.raises(InputError, match="choose another --step"):
        export(tmp_path / "run", tmp_path / "out.safetensors", step=2)


def test_the_page_shows_the_lines_that_files_hold():
    blocks = python_of_the_page()
    demo = load_config(ROOT / "configs/demo.yaml").model
    assert blocks[2] == torchvision_layout.build_lines(ModelConfig(backbone="resnet50", stem="3x3s2"), 64)
    assert blocks[3] == torchvision_layout.build_lines(demo, demo.width)
