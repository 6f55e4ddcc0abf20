"""A made state dict with the names of SimCLRv2's heads gives the layers that its code runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from largescale.checkpoint.tensorflow_heads import classifier, projection
from shards.ground.errors import InputError

WIDTHS = [6, 5, 5, 4]
FILE = Path("r50.safetensors")


def variables() -> dict[str, Tensor]:
    """Of a head of three layers and of a classifier, in another order than that of the layers."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number in (2, 0, 1):
        width, prefix = WIDTHS[number + 1], f"head_contrastive/nl_{number}"
        found[f"{prefix}/dense/kernel"] = torch.randn(WIDTHS[number], width, generator=generator)
        for name in ("gamma", *(["beta"] if number < 2 else []), "moving_mean", "moving_variance"):
            found[f"{prefix}/batch_normalization/{name}"] = torch.rand(width, generator=generator) + 0.5
        found[f"{prefix}/dense/kernel/Momentum"] = torch.zeros(1)
    found["head_supervised/linear_layer/dense/kernel:0"] = torch.randn(WIDTHS[1], 3, generator=generator)
    found["head_supervised/linear_layer/dense/bias:0"] = torch.randn(3, generator=generator)
    return found


def by_hand(found: dict[str, Tensor], x: Tensor, layers: int) -> Tensor:
    """The published code's `nonlinear_head`, in evaluation mode."""
    for number in range(layers):
        own = {name.rpartition("/")[2]: tensor for name, tensor in found.items() if f"nl_{number}/" in name}
        x = x @ own["kernel"]
        x = (x - own["moving_mean"]) / (own["moving_variance"] + 1e-5).sqrt() * own["gamma"] + own.get("beta", 0)
        if number < 2:
            x = x.relu()
    return x


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_projection_head_is_theirs_from_layer_to_layer(layers):
    found, x = variables(), torch.randn(7, WIDTHS[0], generator=torch.Generator().manual_seed(1))
    head = projection(FILE, found)
    assert [type(module).__name__ for module in head] == 2 * ["Linear", "BatchNorm1d", "ReLU"] + [
        "Linear",
        "BatchNorm1d",
    ]
    torch.testing.assert_close(head[: 3 * layers](x), by_hand(found, x, layers))
    assert not head.training and not any(one.requires_grad for one in head.parameters())


def test_the_supervised_head_is_turned():
    found, x = variables(), torch.randn(7, WIDTHS[1])
    kernel, bias = (found[f"head_supervised/linear_layer/dense/{name}:0"] for name in ("kernel", "bias"))
    torch.testing.assert_close(classifier(FILE, found)(x), x @ kernel + bias)


def test_files_without_heads_have_none():
    assert projection(FILE, {"base_model/conv2d/kernel": torch.zeros(1)}) is None
    assert classifier(FILE, {"ema_model/head_supervised/linear_layer/dense/bias": torch.zeros(1)}) is None


@pytest.mark.parametrize(
    "name, tensor, says",
    [
        ("head_contrastive/nl_1/dense/kernel", None, "nl_1 lacks its kernel"),
        ("head_contrastive/nl_0/batch_normalization/gamma", None, "nl_0 lacks its gamma"),
        ("head_contrastive/nl_1/dense/kernel", torch.zeros(9, 5), "nl_1 takes 9 numbers, and the layer before gives 5"),
        ("head_contrastive/nl_1/batch_normalization/beta", torch.zeros(1), "nl_1: its variables are not of one layer"),
        ("head_supervised/linear_layer/dense/bias:0", torch.zeros(4), r"found bias \[4\], kernel \[5, 3\]"),
        ("head_supervised/linear_layer/dense/kernel:0", None, r"found bias \[3\]"),
    ],
)
def test_what_is_not_whole_is_named(name, tensor, says):
    found = variables()
    found.pop(name)
    if tensor is not None:
        found[name] = tensor
    with pytest.raises(InputError, match=f"^r50.safetensors: head_.*{says}"):
        projection(FILE, found)
        classifier(FILE, found)
