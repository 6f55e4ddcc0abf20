"""Weights that others published, in a backbone of ours: all of its tensors, or none.

    taken = take(read_state("swav_800ep_pretrain.pth.tar"), backbone, model)    # tensors by our names
    found = load_backbone("resnet50.pth")                                            # a network with these weights

Most damage that weights have done in other projects comes from loading what fits by name and leaving the rest random.
Here each tensor of the backbone must be there with its shape, and whatever else lies under the same prefix must be a
head that is known as one; otherwise the first differences are named, and the architecture that the file seems to hold.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from largescale.checkpoint import tensorflow_heads, tensorflow_layout, torchvision_layout
from largescale.checkpoint.architectures import COUNTER, Shapes, closest, name_of
from largescale.checkpoint.folder import stamp_of
from largescale.checkpoint.foreign_layouts import (
    HEADS,
    IMAGENET,
    LAYOUTS,
    ORIGINS,
    SECOND,
    TENSORFLOW,
    WRAPPERS,
    Layout,
)
from largescale.checkpoint.state_file import StateFile, read_state
from largescale.config import ModelConfig
from largescale.config.model_values import model_of
from largescale.models.backbones import build_backbone
from largescale.processes import rank
from shards.ground.errors import InputError

_SHOWN = 5
_MOST_SIDE = 16384
"""Pixels of a side that `evaluate.size` takes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """The tensors of a backbone that a file holds.

    Attributes:
        tensors: by the names of our backbone; not to be written to.
        layout: whose names the file has, and under which prefix, for people.
        mean, std: what images must be normalised with, as far as the file or its origin tells; else ImageNet's.
        left: names in the file that were not taken.
    """

    tensors: dict[str, Tensor]
    layout: str
    mean: list[float]
    std: list[float]
    left: list[str]

    def summary(self) -> str:
        """What was recognised, taken and left, in a line."""
        kinds = sorted({_kind(name) for name in self.left})
        left = f"; left there: {len(self.left)} others ({', '.join(kinds[:_SHOWN])}{', ...' * (len(kinds) > _SHOWN)})"
        count = len(self.tensors)
        return f"recognised as {self.layout}: {count} of {count} backbone tensors{left if self.left else ''}"


@dataclass(frozen=True)
class ForeignBackbone:
    """A backbone with weights from a file, in evaluation mode, on the CPU, in float32, without gradients.

    Attributes:
        backbone: images [B, 3, H, W], RGB, normalised with `mean` and `std`, to features [B, num_features].
        num_features: width of its features.
        model: its architecture.
        mean, std: of the channels of images from 0 to 1.
        path, sha256: of the file.
        taken: what was recognised, taken and left.
        resize, size: of images, as its metadata say: shorter side before a centre crop, and side of that; 0 if they do
            not.
        projection: the head that embeds features, likewise in evaluation mode, where the file's layout has one that is
            known (docs/weights.md); its first layers may be kept for fine-tuning.
        classifier: the linear one that the file has, if its layout is known; it may stand on layers of `projection`.
    """

    backbone: nn.Module
    num_features: int
    model: ModelConfig
    mean: list[float]
    std: list[float]
    path: Path
    sha256: str
    taken: Taken = field(repr=False)
    resize: int = 0
    size: int = 0
    projection: nn.Sequential | None = field(default=None, repr=False)
    classifier: nn.Linear | None = field(default=None, repr=False)


def load_backbone(weights: str | Path, model: ModelConfig | None = None, *, stem_told: bool = False) -> ForeignBackbone:
    """A backbone with the weights of a file: torchvision's, timm's, or of another project listed in docs/weights.md.

    Args:
        weights: safetensors, or a file of torch.save, or a folder in the layout of Hugging Face.
        model: the architecture; None takes the one that the tensors are of.
        stem_told: the user says which stem it is, so that a stride that tensors do not tell is no matter for a warning.

    Raises:
        InputError: not a file of weights, or not all of the backbone is in it; says what differs.
    """
    file = read_state(weights)
    model = model or _architecture_of(file, stem_told)
    with torch.device("meta"):
        backbone, num_features = build_backbone(model)
    taken = take(file, backbone, model)
    state = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).clone(memory_format=torch.contiguous_format)
        for name, tensor in taken.tensors.items()
    }
    backbone.load_state_dict(state, strict=True, assign=True)
    backbone.eval().requires_grad_(False)
    return ForeignBackbone(
        backbone,
        num_features,
        model,
        taken.mean,
        taken.std,
        file.path,
        stamp_of(file.path).sha256,
        taken,
        *_sizes(file),
        *_heads(file, num_features),
    )


def _heads(file: StateFile, num_features: int) -> tuple[nn.Sequential | None, nn.Linear | None]:
    """Heads in a layout that is known; of other files none.

    Raises:
        InputError: they are not whole, or the first is not for such features.
    """
    if not tensorflow_layout.is_one(file.tensors):
        return None, None
    projection = tensorflow_heads.projection(file.path, file.tensors)
    if projection is not None and projection[0].in_features != num_features:
        raise InputError(
            f"{file.path}: its head takes {projection[0].in_features} numbers, but its backbone gives {num_features}"
        )
    return projection, tensorflow_heads.classifier(file.path, file.tensors)


@dataclass(frozen=True)
class _Network:
    """The network to take in a file.

    Attributes:
        layout, prefix: whose names it has, and what stands before them.
        inside: names in the file (without wrappers) by torchvision's names, of all that lies under the prefix.
        shapes: by torchvision's names, of what is neither a head nor of another network.
    """

    layout: Layout
    prefix: str
    inside: dict[str, str]
    shapes: Shapes


def take(file: StateFile, backbone: nn.Module, model: ModelConfig) -> Taken:
    """The tensors of a backbone in a file.

    Args:
        file: what was read.
        backbone: whose tensors are wanted; may be on the meta device.
        model: its architecture, for messages.

    Raises:
        InputError: one is missing or has another shape, or the file holds no known network, or several.
    """
    named, state = _without_wrappers(file), backbone.state_dict()
    there, aside = list(named), list[str]()
    if by_number := tensorflow_layout.is_one(named):
        known, aside = tensorflow_layout.renamed(file.path, named, backbone), tensorflow_layout.others(named)
        named = {torchvision_layout.name_of(backbone, key): tensor for key, tensor in known.items()}
    network = _find(file.path, named)
    ours = {torchvision_layout.name_of(backbone, key): key for key in state}
    wanted = {key: tuple(state[own].shape) for key, own in ours.items()}
    _require_equal(file.path, network, wanted, model)
    inside = network.inside
    tensors = {
        own: named[inside[key]] if key in inside else torch.zeros((), dtype=torch.int64) for key, own in ours.items()
    }
    used = {inside[key] for key in wanted if key in inside}
    mean, std, origin = _normalisation(file, there)
    words = "".join(
        (
            TENSORFLOW if by_number else network.layout.title,
            f" under {network.prefix.rstrip('.')}" if network.prefix else "",
            f", of {origin}" if origin else "",
        )
    )
    return Taken(tensors, words, mean, std, [*(key for key in named if key not in used), *aside])


def _without_wrappers(file: StateFile) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        short = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if short in named:
            raise InputError(f"{file.path}: holds {short} twice, with a wrapper's prefix and without; keep one of them")
        named[short] = tensor
    return named


def _find(path: Path, named: dict[str, Tensor]) -> _Network:
    found = [(layout, prefix) for layout in LAYOUTS for prefix in layout.prefixes(list(named))]
    if not found:
        raise InputError(
            f"{path}: no ResNet, RegNet or VGG in a known layout; its {len(named)} tensors are named like "
            f"{', '.join(list(named)[:3])}; docs/weights.md lists the layouts"
        )
    first = [one for one in found if not SECOND & set(one[1].split("."))] or found
    if len(first) > 1:
        prefixes = " and ".join(repr(prefix) for _, prefix in first[:3])
        raise InputError(f"{path}: holds several networks, under {prefixes}; save the one to take in a file of its own")
    [(layout, prefix)] = first
    others = [other for _, other in found if other != prefix and other.startswith(prefix)]
    under = {key: key.removeprefix(prefix) for key in named if key.startswith(prefix)}
    inside = {layout.torchvision_name(name): key for key, name in under.items()}
    shapes = {
        name: tuple(named[key].shape)
        for name, key in inside.items()
        if under[key].partition(".")[0] not in HEADS and not any(key.startswith(other) for other in others)
    }
    return _Network(layout, prefix, inside, shapes)


def _require_equal(path: Path, network: _Network, wanted: Shapes, model: ModelConfig) -> None:
    there = network.shapes
    differ = [
        key
        for key in {**wanted, **there}
        if there.get(key) != wanted.get(key) and (key in there or not key.endswith(COUNTER))
    ]
    if not differ:
        return
    shown = "; ".join(
        f"{key} ({_shape(there.get(key))} there, {_shape(wanted.get(key))} here)" for key in differ[:_SHOWN]
    )
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    words = closest(network.layout.family, there).words(model)
    raise InputError(f"{path}: not a {name_of(model)}: {len(differ)} tensors differ: {shown}{more}; {words}")


def _architecture_of(file: StateFile, stem_told: bool) -> ModelConfig:
    """The architecture whose tensors a file holds.

    Raises:
        InputError: it is none of those known.
    """
    if "config" in file.metadata:  # of an export of ours: tensors do not tell a stem's stride
        if model := model_of(_parsed(file.metadata["config"])):
            return model
        _warn(file, "config", "not the configuration of an export of this project")
    named = _without_wrappers(file)
    if tensorflow_layout.is_one(named):
        return tensorflow_layout.model_in(file.path, named)
    network = _find(file.path, named)
    best = closest(network.layout.family, network.shapes)
    if best.equal != best.total:
        raise InputError(f"{file.path}: of no known architecture; {best.words(best.model)}")
    if best.model.stem == "3x3s2" and not stem_told:
        _log.warning(
            "%s: its 3x3 stem is taken to have stride 2, which tensors do not tell; if it has 1, pass model.stem=3x3",
            file.path,
        )
    return best.model


def _normalisation(file: StateFile, names: list[str]) -> tuple[list[float], list[float], str]:
    """Mean, standard deviation, and the name of the origin if the file tells it."""
    origin = next((one for one in ORIGINS if one.tells(names)), None)
    mean, std = (origin.mean, origin.std) if origin else IMAGENET
    own = {key: _parsed(file.metadata[key]) for key in ("mean", "std") if key in file.metadata}
    beside = _parsed(file.metadata.get("pretrained_cfg", "{}"))
    if not isinstance(beside, dict):
        _warn(file, "pretrained_cfg", "not a JSON object")
        beside = {}
    for source, where in ((own, ""), (beside, "pretrained_cfg: ")):
        own_mean, own_std = source.get("mean"), source.get("std")
        if _three_numbers(own_mean) and _three_numbers(own_std) and min(own_std) > 0:
            mean, std = own_mean, own_std
        elif "mean" in source or "std" in source:
            _warn(file, f"{where}mean and std", "not three finite numbers each, those of std above 0")
    return [*map(float, mean)], [*map(float, std)], origin.title if origin else ""


def _sizes(file: StateFile) -> tuple[int, int]:
    """Shorter side before the centre crop, and side of that; zeros where the file does not tell, or nonsense."""
    beside = _parsed(file.metadata.get("pretrained_cfg", "{}"))
    of_timm = beside if isinstance(beside, dict) else {}
    shape = _parsed(file.metadata["input_size"]) if "input_size" in file.metadata else of_timm.get("input_size")
    if not (isinstance(shape, list) and len(shape) == 3 and type(shape[2]) is int and 1 <= shape[2] <= _MOST_SIDE):
        return 0, 0
    size, share = shape[2], of_timm.get("crop_pct")
    resize = _parsed(file.metadata.get("resize", "null"))
    if type(resize) is not int and isinstance(share, int | float) and 0.1 <= share <= 1:
        resize = math.floor(size / share)  # as timm resizes
    return (resize if type(resize) is int and size <= resize <= _MOST_SIDE else size), size


def _parsed(text: str) -> Any:
    """What JSON holds; None for what is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _three_numbers(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_finite, value))


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an int beyond what a float holds
        return False


def _warn(file: StateFile, entry: str, trouble: str) -> None:
    """Say that an entry of the metadata is ignored, once over all ranks."""
    if rank() == 0:
        _log.warning("%s: %s in its metadata: %s; ignored", file.path, entry, trouble)


def _kind(name: str) -> str:
    """The beginning of a name, as far as it says what a tensor is of."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part in HEADS | SECOND), None)
    return ".".join(parts[: place + 1] if place is not None else parts[:2] if len(parts) > 2 else parts[:1])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
