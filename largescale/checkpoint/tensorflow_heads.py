"""Heads among SimCLRv2's TensorFlow variables (arXiv 2006.10029), as modules of ours.

    head_contrastive/nl_0/dense/kernel                         [in, out], turned
    head_contrastive/nl_0/batch_normalization/gamma, beta, moving_mean, moving_variance
    head_contrastive/nl_1/...                                  ReLU between layers; the last one has no beta
    head_supervised/linear_layer/dense/kernel, bias

In a checkpoint that was fine-tuned from a layer of the first head, the second one stands on that layer; in others on
the backbone. The shapes are the same, so files do not tell which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from shards.ground.errors import InputError

_LAYER = re.compile(
    r"head_contrastive/nl_(\d+)/(?:dense/(kernel)|batch_normalization(?:_\d+)?/(gamma|beta|moving_mean|moving_variance))"
)
_CLASSIFIER = re.compile(r"head_supervised/linear_layer/dense/(kernel|bias)")
_NEEDED = ("kernel", "gamma", "moving_mean", "moving_variance")


def projection(path: Path, named: Mapping[str, Tensor]) -> nn.Sequential | None:
    """The projection head, in evaluation mode and without gradients: linear, BatchNorm, ReLU, ...; None without one.

    Args:
        path: of the file, for messages.
        named: variables by their names in it.

    Raises:
        InputError: a layer or a variable of one is missing, or widths do not follow each other.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        if match := _LAYER.fullmatch(_plain(name)):
            layers.setdefault(int(match[1]), {})[match[2] or match[3]] = tensor
    if not layers:
        return None
    for number in range(max(layers) + 1):
        missing = [what for what in _NEEDED if what not in layers.get(number, {})]
        if missing:
            raise InputError(f"{path}: head_contrastive/nl_{number} lacks its {' and '.join(missing)}")
    ordered = [layers[number] for number in sorted(layers)]
    _require_widths(path, ordered)
    modules: list[nn.Module] = []
    for layer in ordered:
        modules += [*([nn.ReLU(inplace=True)] if modules else []), _linear(layer["kernel"]), _batchnorm(layer)]
    return nn.Sequential(*modules).eval().requires_grad_(False)


def classifier(path: Path, named: Mapping[str, Tensor]) -> nn.Linear | None:
    """The supervised head, without gradients; None without one.

    Args:
        path, named: as of `projection`.

    Raises:
        InputError: one of its variables is missing, or of another shape.
    """
    found = {match[1]: tensor for name, tensor in named.items() if (match := _CLASSIFIER.fullmatch(_plain(name)))}
    if not found:
        return None
    kernel, bias = found.get("kernel"), found.get("bias")
    if kernel is None or bias is None or kernel.ndim != 2 or bias.shape != kernel.shape[1:]:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(found.items()))
        raise InputError(f"{path}: head_supervised: expected kernel [D, K] and bias [K], found {shapes}")
    return _linear(kernel, bias).requires_grad_(False)


def _require_widths(path: Path, layers: list[dict[str, Tensor]]) -> None:
    for number, layer in enumerate(layers):
        width = layer["kernel"].shape[-1]
        if layer["kernel"].ndim != 2 or any(
            tensor.shape != (width,) for name, tensor in layer.items() if name != "kernel"
        ):
            raise InputError(f"{path}: head_contrastive/nl_{number}: its variables are not of one layer's shapes")
    for number, (before, after) in enumerate(pairwise(layers), 1):
        if before["kernel"].shape[1] != after["kernel"].shape[0]:
            raise InputError(
                f"{path}: head_contrastive/nl_{number} takes {after['kernel'].shape[0]} numbers, and the layer before "
                f"gives {before['kernel'].shape[1]}"
            )


def _linear(kernel: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(kernel.shape[0], kernel.shape[1], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(kernel.T)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def _batchnorm(layer: Mapping[str, Tensor]) -> nn.BatchNorm1d:
    """With a shift of 0 where there is none."""
    norm = nn.BatchNorm1d(len(layer["gamma"]))
    with torch.no_grad():
        norm.weight.copy_(layer["gamma"])
        if "beta" in layer:
            norm.bias.copy_(layer["beta"])
    norm.running_mean = layer["moving_mean"].float().clone()
    norm.running_var = layer["moving_variance"].float().clone()
    return norm


def _plain(name: str) -> str:
    return name.removesuffix(":0").removeprefix("/")
