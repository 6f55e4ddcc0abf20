"""A made state dict with the names of SimCLRv2's TensorFlow variables: every layer of ours gets its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.checkpoint.foreign import load_backbone
from largescale.checkpoint.state_file import read_state
from largescale.checkpoint.tensorflow_layout import is_one, model_in
from largescale.config import ModelConfig, load_config
from largescale.evaluate.image_training import kept_layers
from largescale.evaluate.training_recipe import Recipe
from largescale.evaluate.weights import Published, method_of
from largescale.models.backbones import build_backbone
from shards.ground.errors import InputError
from tests.helpers.commands import TINY

OF_NORMS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def made(backbone: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """TensorFlow's variables with a network's weights.

    Args:
        layers: its convolutions and normalisations in the order in which the published code makes them.
    """
    found, counts = {}, {"conv2d": 0, "batch_normalization": 0}
    for name in layers:
        layer = backbone.get_submodule(name)
        kind = "batch_normalization" if isinstance(layer, _BatchNorm) else "conv2d"
        number = f"_{counts[kind]}" if counts[kind] else ""
        counts[kind] += 1
        if kind == "conv2d":
            found[f"base_model/conv2d{number}/kernel"] = layer.weight.permute(2, 3, 1, 0).contiguous()
        else:
            for theirs, ours in OF_NORMS.items():
                found[f"base_model/batch_normalization{number}/{theirs}"] = getattr(layer, ours).clone()
    found["base_model/conv2d/kernel/Momentum"] = torch.zeros(1)
    found["ema_model/base_model/conv2d/kernel"] = torch.zeros(1)
    found["head_contrastive/nl_0/dense/kernel"] = torch.randn(2048, 3)
    for number, theirs in enumerate(OF_NORMS):
        found[f"head_contrastive/nl_0/batch_normalization/{theirs}"] = torch.rand(3) + number
    found["head_supervised/linear_layer/dense/bias"] = torch.zeros(2)
    found["head_supervised/linear_layer/dense/kernel"] = torch.randn(3, 2)
    found["global_step"] = torch.zeros(())
    return {name: found[name] for name in sorted(found)}  # as files have them: conv2d_10 before conv2d_2


def order(selective: bool, depths: list[int]) -> list[str]:
    """The names of our layers in that order, written down from the published code."""
    layers = [f"stem.{n}" for n in (0, 1, 3, 4, 6, 7)] if selective else ["conv1", "bn1"]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            prefix = f"stages.{stage}.{block}" if selective else f"layer{stage + 1}.{block}"
            shortcut = ["downsample.1", "downsample.2"] if selective else ["downsample.0", "downsample.1"]
            select = ["select.conv", "select.bn", "select.squeeze", "select.squeeze_bn", "select.expand"]
            branch = ["conv1", "bn1", *(select if selective else ["conv2", "bn2"]), "conv3", "bn3"]
            layers += [f"{prefix}.{name}" for name in [*(shortcut if block == 0 else []), *branch]]
    return layers


def network(name: str) -> nn.Module:
    """With other numbers in every tensor."""
    torch.manual_seed(0)
    backbone, _ = build_backbone(ModelConfig(backbone=name))
    for tensor in backbone.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return backbone.eval()


@pytest.mark.parametrize("name, selective", [("resnet50_sk", True), ("resnet50", False)])
def test_every_layer_gets_its_own_variables(tmp_path, name, selective):
    theirs = network(name)
    variables = made(theirs, order(selective, [3, 4, 6, 3]))
    save_file(variables, tmp_path / "model.safetensors")
    found = load_backbone(tmp_path / "model.safetensors")
    assert found.model.backbone == name and (found.mean, found.std) == ([0.0] * 3, [1.0] * 3)
    for key, value in theirs.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(found.backbone.state_dict()[key], value), key
    assert found.taken.layout == "SimCLRv2's TensorFlow variables, of SimCLRv2"
    assert {name.partition("/")[0] for name in found.taken.left} == {
        "base_model", "ema_model", "global_step", "head_contrastive", "head_supervised"
    }  # fmt: skip
    weights = Published(found)
    config = replace(load_config(TINY, ["data.shards=x", "run.dir=y"]), model=found.model)
    for trained in (True, False):
        layers = kept_layers(method_of(config, weights, trained=trained), Recipe(1, 1, 0.1, 0.1, head_layers=1))
        kernel = variables["head_contrastive/nl_0/dense/kernel"]
        assert torch.equal(layers[0].weight, kernel.T) == trained and len(layers) == 2
    torch.testing.assert_close(found.classifier.weight, variables["head_supervised/linear_layer/dense/kernel"].T)
    with pytest.raises(InputError, match=r"this backbone \d+; set model.\* as there"):
        load_backbone(tmp_path / "model.safetensors", ModelConfig("resnet101_sk" if selective else "resnet101"))
    other = ModelConfig("resnet50w2_sk" if selective else "resnet50w2")
    with pytest.raises(InputError, match=f"not a {other.backbone}: .* tensors differ"):
        load_backbone(tmp_path / "model.safetensors", other)


@pytest.mark.parametrize(
    "name, first, count",
    [("resnet152w3_sk", (3, 3, 3, 96), 257), ("resnet101w2_sk", (3, 3, 3, 64), 172), ("resnet152", (7, 7, 3, 64), 155)],
)
def test_architectures_are_told_by_their_convolutions(tmp_path, name, first, count):
    named = {f"base_model/conv2d{f'_{n}' if n else ''}/kernel": torch.empty(1, 1, 1, 1) for n in range(count)}
    named["base_model/conv2d/kernel"] = torch.empty(first)
    assert is_one(named) and model_in(tmp_path, named).backbone == name
    with torch.device("meta"):
        backbone, _ = build_backbone(ModelConfig(backbone=name))
    assert sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) == count


def test_wide_networks_without_selective_kernels_are_described(tmp_path):
    named = {f"base_model/conv2d{f'_{n}' if n else ''}/kernel": torch.empty(1, 1, 1, 1) for n in range(53)}
    named["base_model/conv2d/kernel"] = torch.empty(7, 7, 3, 128)
    found = model_in(tmp_path, named)
    assert (found.backbone, found.depths, found.width, found.block) == ("resnet", [3, 4, 6, 3], 128, "bottleneck")


def test_other_files_are_left_to_other_layouts(tmp_path):
    assert not is_one({"conv1.weight": torch.empty(1), "ema_model/base_model/conv2d/kernel": torch.empty(1)})
    save_file({"base_model/conv2d/kernel": torch.zeros(2)}, tmp_path / "one.safetensors")
    assert is_one(read_state(tmp_path / "one.safetensors").tensors)
    with pytest.raises(InputError, match="of no known network: 1 convolutions"):
        load_backbone(tmp_path / "one.safetensors")
