"""Weights in the layouts of other projects, renamed from torchvision's networks: all of a backbone is taken, or none.

Covers: largescale/checkpoint/architectures.py, largescale/checkpoint/foreign_layouts.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import regnet_y_400mf
from torchvision.models.resnet import Bottleneck, ResNet

from largescale.checkpoint.foreign import load_backbone
from largescale.config import ModelConfig
from shards.ground.errors import InputError

State = dict[str, Tensor]


def scrambled(network: nn.Module) -> nn.Module:
    """Weights and statistics that are not those of a new network."""
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """torchvision's ResNet, eight times narrower than a ResNet-50, of one block more than a ResNet-14."""
    network = ResNet(Bottleneck, [1, 2, 1, 1])
    network.conv1, network.bn1, network.inplanes = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), 8
    for number, depth in enumerate([1, 2, 1, 1]):
        stride = 1 if number == 0 else 2
        setattr(network, f"layer{number + 1}", network._make_layer(Bottleneck, 8 * 2**number, depth, stride=stride))
    network.fc = nn.Linear(256, 10)
    return scrambled(network)


@pytest.fixture(scope="module")
def regnet() -> nn.Module:
    return scrambled(regnet_y_400mf())


def under(prefix: str, state: State, *, fc: bool = True) -> State:
    return {f"{prefix}{name}": value for name, value in state.items() if fc or not name.startswith("fc.")}


def wrong(state: State) -> State:
    """Another network of the same names and shapes."""
    return {name: value + 1 for name, value in state.items()}


HEAD = {"0.weight": torch.zeros(4, 256), "1.running_mean": torch.zeros(4), "3.weight": torch.zeros(2, 4)}


def simclr_name(name: str) -> str:
    name = re.sub(r"^conv1\.", "net.0.0.", re.sub(r"^bn1\.", "net.0.1.0.", name))
    name = re.sub(r"^layer(\d)\.", r"net.\1.blocks.", name)
    name = re.sub(r"\.conv(\d)\.", lambda found: f".net.{2 * int(found[1]) - 2}.", name)
    name = re.sub(r"\.bn(\d)\.", lambda found: f".net.{2 * int(found[1]) - 1}.0.", name)
    return name.replace(".downsample.0.", ".projection.shortcut.").replace(".downsample.1.", ".projection.bn.0.")


RESNET_FILES: dict[str, tuple[Callable[[State], Any], str]] = {
    "torchvision, timm": (lambda s: s, "torchvision's ResNet: "),
    "BYOL, converted": (
        lambda s: {name: value for name, value in s.items() if "num_batches" not in name},
        "torchvision's ResNet: ",
    ),
    "SwAV": (
        lambda s: (
            under("module.", s, fc=False)
            | under("module.projection_head.", HEAD)
            | {"module.prototypes.weight": torch.zeros(3, 2)}
        ),
        "of SwAV, DeepCluster-v2 or SeLa-v2",
    ),
    "DeepCluster-v2, training": (
        lambda s: {
            "epoch": 3,
            "state_dict": under("module.", s, fc=False)
            | under("module.projection_head.", HEAD)
            | {f"module.prototypes.prototypes{i}.weight": torch.zeros(3, 2) for i in range(3)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        },
        "under state_dict, of SwAV",
    ),
    "VISSL": (
        lambda s: {
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": under("_feature_blocks.", s, fc=False), "heads": under("0.clf.", HEAD)}
                }
            }
        },
        "under classy_state_dict.base_model.model.trunk._feature_blocks, of VISSL",
    ),
    "VISSL, converted": (lambda s: {"model_state_dict": under("_feature_blocks.", s, fc=False)}, "of VISSL"),
    "MoCo v1, v2": (
        lambda s: {
            "arch": "resnet50",
            "state_dict": under("module.encoder_q.", s)
            | under("module.encoder_k.", wrong(s))
            | {"module.queue": torch.zeros(2, 3), "module.queue_ptr": torch.zeros(1)},
        },
        "under state_dict.encoder_q, of MoCo v1 or v2",
    ),
    "MoCo, one GPU": (lambda s: {"state_dict": under("encoder_q.", s) | under("encoder_k.", wrong(s))}, "of MoCo"),
    "MoCo v3": (
        lambda s: {
            "state_dict": under("module.base_encoder.", s, fc=False)
            | under("module.base_encoder.fc.", HEAD)
            | under("module.momentum_encoder.", wrong(s), fc=False)
            | under("module.predictor.", HEAD)
        },
        "of MoCo v3",
    ),
    "DINO, full": (
        lambda s: {
            "student": under("module.backbone.", wrong(s), fc=False) | under("module.head.mlp.", HEAD),
            "teacher": under("module.backbone.", s, fc=False) | under("module.head.mlp.", HEAD),
            "dino_loss": {"center": torch.zeros(1, 4)},
        },
        "under teacher.backbone, of DINO",
    ),
    "Barlow Twins, VICReg, full": (
        lambda s: {
            "model": under("module.backbone.", s, fc=False)
            | under("module.projector.", HEAD)
            | {"module.bn.running_mean": torch.zeros(4)}
        },
        "under model.backbone",
    ),
    "PAWS": (
        lambda s: {
            "encoder": under("module.", s, fc=False) | under("module.fc.fc1.", HEAD) | under("module.pred.", HEAD)
        },
        "under encoder, of PAWS",
    ),
    "lightly, solo": (
        lambda s: {
            "state_dict": under("backbone.", s, fc=False)
            | under("momentum_backbone.", wrong(s), fc=False)
            | under("projector.", HEAD)
        },
        "under state_dict.backbone",
    ),
    "torch.compile": (lambda s: under("_orig_mod.", s), "torchvision's ResNet: "),
    "SimCLRv2, converted": (
        lambda s: {"resnet": {simclr_name(name): value for name, value in s.items()}, "head": HEAD},
        "of SimCLRv2",
    ),
}


@pytest.mark.parametrize("name", RESNET_FILES)
def test_resnets(resnet, tmp_path, name):
    make, words = RESNET_FILES[name]
    torch.save(make(resnet.state_dict()), tmp_path / "file.pth")
    found = load_backbone(tmp_path / "file.pth")
    expected = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(found.backbone(images), expected(images))
    count = sum(not key.startswith("fc.") for key in resnet.state_dict())
    assert words in found.taken.summary() + ": " and f": {count} of {count} backbone tensors" in found.taken.summary()
    assert (found.model.backbone, found.model.width, found.model.depths) == ("resnet", 8, [1, 2, 1, 1])
    std = {"SwAV": 0.228, "DeepCluster-v2, training": 0.228, "SimCLRv2, converted": 1.0}.get(name, 0.229)
    assert found.std[0] == std and len(found.sha256) == 64 and found.num_features == 256


def timm_name(name: str) -> str:
    name = re.sub(r"^trunk_output\.block\d\.block(\d)-(\d+)\.", lambda f: f"s{f[1]}.b{int(f[2]) + 1}.", name)
    for ours, theirs in (
        ("f.a", "conv1"),
        ("f.b", "conv2"),
        ("f.c", "conv3"),
        ("proj", "downsample"),
        ("stem", "stem"),
    ):
        name = re.sub(rf"(^|\.){ours}\.0\.", rf"\1{theirs}.conv.", name)
        name = re.sub(rf"(^|\.){ours}\.1\.", rf"\1{theirs}.bn.", name)
    return re.sub(r"^fc\.", "head.fc.", name.replace(".f.se.", ".se."))


def vissl_name(name: str, part: str = "") -> str:
    name = re.sub(
        r"^trunk_output\.block(\d)\.",
        lambda f: f"res{int(f[1]) + 1}." + (f"block{f[1]}-{part}." if part else ""),
        re.sub(r"^stem\.", "conv1.stem.", name),
    )
    name = name.replace(".proj.0.", ".proj.").replace(".proj.1.", ".bn.").replace(".f.c.0.", ".f.c.")
    return (
        name.replace(".f.c.1.", ".f.final_bn.")
        .replace(".f.se.fc1.", ".f.se.excitation.0.")
        .replace(".f.se.fc2.", ".f.se.excitation.2.")
    )


def hf_name(name: str) -> str:
    name = name.replace("stem.0.", "embedder.embedder.convolution.")
    name = name.replace("stem.1.", "embedder.embedder.normalization.")
    name = re.sub(
        r"^trunk_output\.block\d\.block(\d)-(\d+)\.", lambda f: f"encoder.stages.{int(f[1]) - 1}.layers.{f[2]}.", name
    )
    for letter, number in (("a", 0), ("b", 1), ("c", 3)):
        name = name.replace(f".f.{letter}.0.", f".layer.{number}.convolution.")
        name = name.replace(f".f.{letter}.1.", f".layer.{number}.normalization.")
    name = name.replace(".f.se.fc1.", ".layer.2.attention.0.").replace(".f.se.fc2.", ".layer.2.attention.2.")
    return name.replace(".proj.0.", ".shortcut.convolution.").replace(".proj.1.", ".shortcut.normalization.")


REGNET_FILES: dict[str, tuple[Callable[[State], Any], str]] = {
    "torchvision": (lambda s: s, "torchvision's RegNet"),
    "timm": (lambda s: {timm_name(name): value for name, value in s.items()}, "timm's RegNet"),
    "SEER": (
        lambda s: {
            "classy_state_dict": {
                "base_model": {
                    "model": {
                        "trunk": under("_feature_blocks.", {vissl_name(name): value for name, value in s.items()}),
                        "heads": {
                            "0.projection_head.0.weight": HEAD["0.weight"],
                            "0.prototypes0.weight": HEAD["3.weight"],
                        },
                    }
                }
            }
        },
        "VISSL's RegNet under classy_state_dict.base_model.model.trunk._feature_blocks, of VISSL",
    ),
    "SEER 10B": (
        lambda s: under("_feature_blocks.", {vissl_name(name, "part0"): value for name, value in s.items()}),
        "VISSL's RegNet",
    ),
    "Hugging Face": (
        lambda s: under("regnet.", {hf_name(name): value for name, value in s.items()}, fc=False),
        "Hugging Face's RegNet under regnet",
    ),
}


@pytest.mark.parametrize("name", REGNET_FILES)
def test_regnets(regnet, tmp_path, name):
    make, words = REGNET_FILES[name]
    made = make({key: value for key, value in regnet.state_dict().items() if not key.startswith("fc.")})
    torch.save(made, tmp_path / "file.pth")
    found = load_backbone(tmp_path / "file.pth", ModelConfig(backbone="regnet_y_400mf"))
    state = found.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in regnet.state_dict().items() if key in state)
    assert f"recognised as {words}" in found.taken.summary() and "382 of 382 backbone tensors" in found.taken.summary()


def test_an_architecture_is_told_by_its_tensors_and_normalisation_by_its_metadata(regnet, tmp_path):
    about = {"format": "pt", "mean": json.dumps([0.5, 0.5, 0.5]), "std": json.dumps([0.2, 0.2, 0.2])}
    save_file(regnet.state_dict(), tmp_path / "file.safetensors", metadata=about)
    found = load_backbone(tmp_path / "file.safetensors")
    assert found.model.backbone == "regnet_y_400mf" and (found.mean, found.std) == ([0.5] * 3, [0.2] * 3)


@pytest.mark.parametrize(
    ("metadata", "entry"),
    [
        *(
            ({"mean": mean, "std": std}, "mean and std")
            for mean, std in (
                ("0.5", "0.5"),
                ("mine", "[0.2, 0.2, 0.2]"),
                ("[0.5]", "[0.5]"),
                ("[0.5, 0.5, NaN]", "[1, 1, 1]"),
                ("[1e999, 0, 0]", "[1, 1, 1]"),
                (f"[1{400 * '0'}, 0, 0]", "[1, 1, 1]"),
                ("[0.5, 0.5, 0.5]", "[0.2, 0, 0.2]"),
                ("[true, true, true]", "[1, 1, 1]"),
                (9999 * "[", "[1, 1, 1]"),
            )
        ),
        ({"std": "[1, 1, 1]"}, "mean and std"),
        ({"pretrained_cfg": "{"}, "pretrained_cfg"),
        ({"pretrained_cfg": "[]"}, "pretrained_cfg"),
        ({"pretrained_cfg": '{"mean": 0.5, "std": null}'}, "pretrained_cfg: mean and std"),
        *(
            ({"config": config}, "config")
            for config in (
                "{",
                "[]",
                "{}",
                '{"model.backbone": "resnet5000"}',
                '{"model.backbone": ["resnet"]}',
                '{"model.backbone": "resnet", "model.width": "8"}',
                f'{{"model.backbone": "resnet", "model.width": 1{400 * "0"}}}',
                '{"model.backbone": "resnet", "model.depths": [1, 2.5]}',
            )
        ),
    ],
)
def test_metadata_that_is_not_as_ours_is_a_warning_and_ignored(resnet, tmp_path, caplog, metadata, entry):
    save_file(resnet.state_dict(), tmp_path / "file.safetensors", metadata=metadata)
    found = load_backbone(tmp_path / "file.safetensors")
    assert (found.mean, found.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (found.model.backbone, found.model.depths) == ("resnet", [1, 2, 1, 1])
    [line] = caplog.messages
    assert line.startswith(f"{tmp_path}/file.safetensors: {entry} in its metadata: not ") and "\n" not in line


def test_defaults_that_were_asked_for_otherwise_are_named_too(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "file.pth")
    asked = ModelConfig("resnet", "3x3s2", [1, 2, 1, 1], 8, "bottleneck", norm="layer")
    words = "are those of model.backbone=resnet model.stem=imagenet model.norm=batch model.depths="
    with pytest.raises(InputError, match=re.escape(words)):
        load_backbone(tmp_path / "file.pth", asked)


@pytest.mark.parametrize("share, resize", [(0.875, 256), (0.95, 235), (1.0, 224)])
def test_images_are_resized_as_timm_does(resnet, tmp_path, share, resize):
    told = json.dumps({"input_size": [3, 224, 224], "crop_pct": share})
    save_file(resnet.state_dict(), tmp_path / "file.safetensors", metadata={"pretrained_cfg": told})
    found = load_backbone(tmp_path / "file.safetensors")
    assert (found.resize, found.size) == (resize, 224)


def test_no_part_of_a_backbone_is_taken(resnet, tmp_path):
    state = resnet.state_dict()
    own = "model.backbone=resnet model.depths=[1,2,1,1] model.width=8 model.block=bottleneck"
    without = {key: value for key, value in state.items() if key != "layer2.1.bn2.bias"}
    more = state | {"layer2.2.conv1.weight": torch.zeros(16, 64, 1, 1), "extra.weight": torch.zeros(2)}
    for content, words in (
        (
            state,
            "not a resnet18: 136 tensors differ: conv1.weight ([8, 3, 7, 7] there, [64, 3, 7, 7] here); bn1.weight",
        ),
        (state, f"all 120 tensors are those of {own}"),
        (
            {"blocks.0.attn.qkv.weight": torch.zeros(2)},
            "no ResNet, RegNet or VGG in a known layout; its 1 tensors are named",
        ),
        (under("a.", state) | under("b.", state), "holds several networks, under 'a.' and 'b.'"),
        (under("module.", state) | state, "holds conv1.weight twice, with a wrapper's prefix and without"),
    ):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(InputError, match=re.escape(words)):
            load_backbone(tmp_path / "file.pth", ModelConfig(backbone="resnet18"))
    right = ModelConfig("resnet", depths=[1, 2, 1, 1], width=8, block="bottleneck")
    for content, words in (
        (
            without,
            f"1 tensors differ: layer2.1.bn2.bias (none there, [16] here); the nearest known architecture is {own}",
        ),
        (more, "layer2.2.conv1.weight ([16, 64, 1, 1] there, none here); extra.weight ([2] there, none here)"),
    ):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(InputError, match=re.escape(words)):
            load_backbone(tmp_path / "file.pth", right)
    with pytest.raises(InputError, match="of no known architecture; the nearest"):
        load_backbone(tmp_path / "file.pth")
