"""SimCLRv2's variables (arXiv 2006.10029), as its published TensorFlow checkpoints name them, in our names.

They are numbered in the order in which layers were made: `base_model/conv2d/kernel`, `base_model/conv2d_1/kernel`, ...,
`base_model/batch_normalization/gamma`, ... In a block, the shortcut comes before the branch. So the n-th convolution
and normalisation are those of our network in the same order, and shapes must agree. Kernels [h, w, in, out] are turned
into [out, in, h, w]. Running averages of weights (`ema_model/`) and the optimizer's variables are left alone.

    # where TensorFlow is installed
    reader = tf.train.load_checkpoint("r50_1x_sk1/model.ckpt-...")
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith(("base_model/", "head_"))]
    safetensors.numpy.save_file({name: reader.get_tensor(name) for name in names}, "r50_1x_sk1.safetensors")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.checkpoint.foreign_layouts import TENSORFLOW
from largescale.config import ModelConfig
from largescale.models.backbones import in_sequence, stages
from largescale.models.selective_kernel import DEPTHS
from shards.ground.errors import InputError

_VARIABLE = re.compile(
    r"base_model/(conv2d|batch_normalization)(?:_(\d+))?/(kernel|gamma|beta|moving_mean|moving_variance)"
)
_ENDINGS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_PER_BLOCK = {False: 3, True: 5}
_IN_STEM = {False: 1, True: 3}
_SHORTCUTS = 4


def others(names: Mapping[str, Tensor]) -> list[str]:
    """Names that are not of the network: heads, running averages, the optimizer's variables."""
    return [name for name in names if not _VARIABLE.fullmatch(_plain(name))]


def is_one(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors have such names."""
    return any(_VARIABLE.fullmatch(_plain(name)) for name in names)


def renamed(path: Path, named: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The tensors of the network by the names of a backbone of ours, kernels turned; heads and others are left out.

    Args:
        path: of the file, for messages.
        named: tensors by their names in it.
        backbone: a ResNet that `build_backbone` made; its shapes are not looked at.

    Raises:
        InputError: it has another number of layers.
    """
    found: dict[str, Tensor] = {}
    ours = {"conv2d": list(_layers(backbone, nn.Conv2d)), "batch_normalization": list(_layers(backbone, _BatchNorm))}
    counts = {kind: len(_numbers(named, kind)) for kind in ours}
    for kind, layers in ours.items():
        if counts[kind] != len(layers):
            what = "convolutions" if kind == "conv2d" else "normalisations"
            raise InputError(
                f"{path}: has {counts[kind]} {what}, but this backbone {len(layers)}; set model.* as there"
            )
    places = {kind: {number: place for place, number in enumerate(_numbers(named, kind))} for kind in ours}
    for name, tensor in named.items():
        match = _VARIABLE.fullmatch(_plain(name))
        if match is None:
            continue
        kind, number, what = match.groups()
        layer = ours[kind][places[kind][int(number or 0)]]
        if what == "kernel":
            found[f"{layer}.weight"] = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor
        else:
            found[f"{layer}.{_ENDINGS[what]}"] = tensor
    return found


def model_in(path: Path, named: Mapping[str, Tensor]) -> ModelConfig:
    """The architecture that variables are of, by the number of convolutions and the shape of the first.

    Raises:
        InputError: it is none of those that were published.
    """
    numbers = _numbers(named, "conv2d")
    first = next((tensor for name, tensor in named.items() if _is_first(name)), None)
    if first is not None and first.ndim == 4:
        selective = first.shape[0] == 3
        width = int(first.shape[3]) * (2 if selective else 1)
        for depth, blocks in DEPTHS.items():
            count = _IN_STEM[selective] + _SHORTCUTS + _PER_BLOCK[selective] * sum(blocks)
            if count == len(numbers) and width % 64 == 0 and width // 64 in (1, 2, 3):
                times = width // 64
                if selective:
                    return ModelConfig(f"resnet{depth}{'' if times == 1 else f'w{times}'}_sk")
                if times == 1:
                    return ModelConfig(f"resnet{depth}")
                return ModelConfig("resnet", depths=blocks, width=width, block="bottleneck")
    raise InputError(f"{path}: {TENSORFLOW}, but of no known network: {len(numbers)} convolutions")


def _is_first(name: str) -> bool:
    match = _VARIABLE.fullmatch(_plain(name))
    return match is not None and match[1] == "conv2d" and match[2] is None


def _plain(name: str) -> str:
    return name.removesuffix(":0").removeprefix("/")


def _numbers(named: Mapping[str, Tensor], kind: str) -> list[int]:
    """Numbers of the layers of a kind, in order."""
    matches = (_VARIABLE.fullmatch(_plain(name)) for name in named)
    return sorted({int(match[2] or 0) for match in matches if match and match[1] == kind})


def _layers(backbone: nn.Module, kind: type[nn.Module]) -> Iterator[str]:
    """Names of a backbone's layers of a kind in the order in which TensorFlow made them."""
    names = {id(module): name for name, module in backbone.named_modules()}
    parts = [in_sequence(backbone)[0]]
    for stage in stages(backbone):
        for block in stage:
            shortcut = getattr(block, "downsample", None)
            parts += [] if shortcut is None else [shortcut]
            parts += [child for name, child in block.named_children() if name != "downsample"]
    for part in parts:
        yield from (names[id(module)] for module in part.modules() if isinstance(module, kind))
