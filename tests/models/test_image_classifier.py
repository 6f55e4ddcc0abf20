"""A classifier goes into a file and comes back from it alone; what is no such file is refused in a line.

Covers: largescale/config/model_values.py, largescale/models/safetensors_content.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from largescale.checkpoint.foreign import load_backbone
from largescale.methods.dino import Projection
from largescale.models.backbones import build_backbone
from largescale.models.image_classifier import (
    ImageClassifier,
    built,
    checksum,
    described,
    first_layers,
    read_classifier,
)
from shards.ground.errors import InputError
from tests.helpers.teachers import CLASSES, teacher, write_teacher

LAYERS = ["linear 4 6", "batchnorm 6 scale", "relu", "linear 6 6 bias", "batchnorm 6", "gelu", "linear 6 3 bias"]


def test_what_is_written_computes_the_same_when_it_is_read(tmp_path):
    path = tmp_path / "a" / "classifier.safetensors"
    write_teacher(path, mean=(0.1, 0.2, 0.3))
    found = read_classifier(path)
    assert (found.classes, found.mean, found.std) == (CLASSES, [0.1, 0.2, 0.3], [0.25] * 3)
    network, tensors = found.load(), safetensors.torch.load_file(path)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    own = ImageClassifier(build_backbone(found.model)[0], built(found.head_layers)).eval()
    own.load_state_dict(tensors, strict=True)
    images = torch.randn(3, 3, 24, 24)
    assert torch.equal(network(images), own(images)) and network(images).shape == (3, 4)
    assert found.load(dtype=torch.float64)(images.double()).dtype == torch.float64
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_no_file_holds_goes_to_the_device_too(tmp_path):
    path = tmp_path / "classifier.safetensors"
    write_teacher(path, sobel=True)
    network = read_classifier(path).load("meta")
    assert {tensor.device.type for tensor in (*network.parameters(), *network.buffers())} == {"meta"}


def test_equal_classifiers_are_equal_files(tmp_path):
    for name in ("a", "b"):
        write_teacher(tmp_path / name)
    assert checksum(tmp_path / "a") == checksum(tmp_path / "b") == checksum(teacher())
    write_teacher(tmp_path / "c", seed=1)
    assert checksum(tmp_path / "c") != checksum(tmp_path / "a")


def test_it_is_a_file_of_weights_too():
    found, network = load_backbone(teacher()), read_classifier(teacher()).load()
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(found.backbone(images), network.backbone(images)) and found.mean == [0.5] * 3


def test_heads_in_words_and_back():
    assert described(built(LAYERS)) == LAYERS
    with pytest.raises(InputError, match="a head with a Dropout cannot be kept; use layer 0"):
        described(nn.Sequential(nn.Dropout()))


def test_the_first_layers_of_a_head_end_before_the_next_linear_one():
    head = built(LAYERS).eval()
    assert [described(first_layers(head, number)) for number in range(4)] == [[], LAYERS[:3], LAYERS[:6], LAYERS]
    x = torch.randn(5, 4)
    by_hand = torch.relu(head[1](x @ head[0].weight.T))
    torch.testing.assert_close(first_layers(head, 1)(x), by_hand)
    assert first_layers(head, 1)[0] is head[0]
    of_its_own = Projection(4, [8], 2)  # made of widths, not of layers
    assert described(first_layers(of_its_own, 1)) == ["linear 4 8 bias", "gelu"]
    with pytest.raises(InputError, match=re.escape("has 3 linear layers; expected 0 (the backbone) to 3")):
        first_layers(head, 4)
    with pytest.raises(InputError, match="its head is a Linear, not a sequence"):
        first_layers(nn.Linear(2, 2), 1)


def changed(tmp_path: Path, **about: object) -> Path:
    """The teacher's file with other metadata; None leaves an entry out."""
    with safetensors.safe_open(teacher(), framework="pt") as file:
        known = dict(file.metadata())
    known |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    path = tmp_path / "changed.safetensors"
    kept = {key: value for key, value in known.items() if about.get(key, "") is not None}
    safetensors.torch.save_file(safetensors.torch.load_file(teacher()), path, metadata=kept)
    return path


@pytest.mark.parametrize(
    "about, expected",
    [
        ({"classes": None}, "holds no classifier; make one with `largescale finetune RUN OUT`"),
        ({"head_layers": None}, "its metadata are damaged"),
        ({"classes": "[a"}, "its metadata are damaged"),
        ({"classes": ["a"]}, "do not describe a classifier"),
        ({"classes": ["a", "b"]}, "does not end in the 2 classes"),
        ({"head_layers": []}, "does not end in the 4 classes"),
        ({"head_layers": ["exec 1 2"]}, "do not describe a classifier"),
        ({"head_layers": [f"linear {'9' * 9} 4"]}, "do not describe a classifier"),
        ({"mean": [0.5, 0.5]}, "do not describe a classifier"),
        ({"config": {"model.backbone": "nothing"}}, "do not describe a classifier"),
        ({"config": [1]}, "do not describe a classifier"),
    ],
)
def test_damaged_descriptions_are_refused(tmp_path, about, expected):
    with pytest.raises(InputError, match=expected):
        read_classifier(changed(tmp_path, **about))


def test_tensors_must_be_those_described(tmp_path):
    found = read_classifier(changed(tmp_path, head_layers=["linear 12 4 bias"]))
    with pytest.raises(InputError, match=r"not what it describes: \d+ tensors differ, such as head\.0\.bias"):
        found.load()


def test_what_is_no_whole_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing: no such file"):
        read_classifier(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a folder; pass the file that `largescale finetune RUN OUT"):
        read_classifier(tmp_path)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(teacher().read_bytes()[:-10])
    with pytest.raises(InputError, match=r"torn.safetensors: not a whole file"):
        read_classifier(torn)
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pt")
    with pytest.raises(InputError, match=r"pickle.pt: not a whole file"):
        read_classifier(tmp_path / "pickle.pt")
    with pytest.raises(InputError, match="nothing"):
        checksum(tmp_path / "nothing")
