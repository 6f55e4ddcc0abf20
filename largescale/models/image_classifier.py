"""A backbone with a classifier, and the file that carries one from run to run.

A file is safetensors: `backbone.*` by this project's names and `head.*`, with metadata that describe both, so that the
network can be built again from nothing but the file. It is also a file of weights for all that takes a backbone.

    {"config": {"model.backbone": ...}, "head_layers": ["linear 64 64", "batchnorm 64", "relu", "linear 64 10 bias"],
     "classes": ["boot", ...], "mean": [r, g, b], "std": [r, g, b], ...}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.config import ModelConfig
from largescale.config.model_values import model_of
from largescale.models.backbones import build_backbone
from largescale.models.safetensors_content import safetensors_content
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

_LAYER = re.compile(r"(linear) (\d{1,8}) (\d{1,8})( bias)?|(batchnorm) (\d{1,8})( scale)?|(relu|gelu)")
_MOST_CLASSES = 2**24


class ImageClassifier(nn.Module):
    """Images [B, 3, H, W] to scores [B, K]."""

    def __init__(self, backbone: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, K], logits of classes."""
        return self.head(self.backbone(images))


@dataclass(frozen=True)
class ClassifierFile:
    """What a file says of the classifier that it holds; `load` reads its weights.

    Attributes:
        path: of the file.
        model: architecture of the backbone.
        head_layers: of the head, as `described` puts them.
        classes: names, in the order of the scores.
        mean, std: what images from 0 to 1 are normalised with.
    """

    path: Path
    model: ModelConfig
    head_layers: list[str]
    classes: list[str]
    mean: list[float]
    std: list[float]

    def load(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ImageClassifier:
        """The classifier in evaluation mode, without gradients.

        Args:
            device, dtype: of its tensors, those of floating point.

        Raises:
            InputError: the tensors are not those that the file describes.
        """
        with torch.device("meta"):
            network = ImageClassifier(build_backbone(self.model)[0], built(self.head_layers))
        own = network.state_dict()
        with _opened(self.path) as file:
            self._require_equal(file, set(file.keys()), own)
            loaded = {}
            for name, tensor in own.items():
                with unset_fake_temporarily():  # a plan's networks have no numbers; files do
                    weights = file.get_tensor(name)
                wanted = dtype if tensor.is_floating_point() else tensor.dtype
                loaded[name] = torch.empty(tensor.shape, dtype=wanted, device=device).copy_(weights)
        network.load_state_dict(loaded, strict=True, assign=True)
        for name, buffer in network.named_buffers():
            if name not in loaded:  # fixed filters, which no file holds
                owner, _, last = name.rpartition(".")
                setattr(network.get_submodule(owner), last, buffer.to(device))
        return network.eval().requires_grad_(False)

    def _require_equal(self, file: Any, there: set[str], own: Mapping[str, Tensor]) -> None:
        differ = sorted(
            name
            for name in there | own.keys()
            if name not in there or name not in own or tuple(file.get_slice(name).get_shape()) != own[name].shape
        )
        if differ:
            raise InputError(f"{self.path}: not what it describes: {len(differ)} tensors differ, such as {differ[0]}")


def read_classifier(path: str | Path) -> ClassifierFile:
    """What a classifier's file says of itself; its tensors are left on the disk.

    Raises:
        InputError: not there, damaged, or not a classifier's.
    """
    path = Path(path).expanduser()
    with _opened(path) as file:
        about: Mapping[str, str] = file.metadata() or {}
    if "classes" not in about:
        raise InputError(f"{path}: holds no classifier; make one with `largescale finetune RUN OUT`")
    try:
        model = model_of(json.loads(about["config"]))
        head_layers, classes, mean, std = (json.loads(about[key]) for key in ("head_layers", "classes", "mean", "std"))
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its metadata are damaged ({error}); write it again") from error
    triples = all(_is_list_of(one, (int, float)) and len(one) == 3 for one in (mean, std))
    named = _is_list_of(classes, str) and 2 <= len(classes) <= _MOST_CLASSES and _is_list_of(head_layers, str)
    if model is None or not triples or not named or not all(map(_LAYER.fullmatch, head_layers)):
        raise InputError(f"{path}: its metadata do not describe a classifier of this version; write it again")
    found = ClassifierFile(path, model, head_layers, classes, mean, std)
    if _last_width(head_layers) != len(classes):
        raise InputError(
            f"{path}: its head does not end in the {len(classes)} classes that its metadata name; write it again"
        )
    return found


def write_classifier(path: Path, network: ImageClassifier, about: Mapping[str, str]) -> None:
    """Write a classifier's file, whole or not at all.

    Args:
        path: it gets this name when it is whole.
        network: with plain tensors.
        about: metadata with `config`, `classes`, `mean` and `std` as JSON, and whatever else is worth saying.
    """
    tensors = {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in network.state_dict().items()
    }
    metadata = {**about, "format": "pt", "head_layers": json.dumps(described(network.head))}
    with atomic_write(path) as file:
        file.writelines(safetensors_content(tensors, metadata))


def checksum(path: str | Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def described(head: nn.Sequential) -> list[str]:
    """The layers of a head in words that `built` understands.

    Raises:
        InputError: it has other layers than linear ones, BatchNorm, ReLU and GELU.
    """
    return [_words(layer) for layer in head]


def built(layers: Sequence[str]) -> nn.Sequential:
    """A head with random weights, of layers that `described` put into words."""
    made: list[nn.Module] = []
    for words in layers:
        found = _LAYER.fullmatch(words)
        assert found, words
        linear, width, next_width, bias, norm, features, scale, other = found.groups()
        if linear:
            made.append(nn.Linear(int(width), int(next_width), bias=bool(bias)))
        elif norm:
            made.append(nn.BatchNorm1d(int(features), affine=bool(scale)))
        else:
            made.append(_ACTIVATIONS[other]())
    return nn.Sequential(*made)


def first_layers(head: nn.Module, number: int) -> nn.Sequential:
    """The first linear layers of a head, each with the normalisation and activation behind it; its own modules.

    Raises:
        InputError: it has fewer, or is no sequence of layers.
    """
    if not isinstance(head, nn.Sequential):
        raise InputError(f"its head is a {type(head).__name__}, not a sequence of layers; use layer 0, the backbone")
    starts = [place for place, layer in enumerate(head) if isinstance(layer, nn.Linear)]
    if number > len(starts):
        raise InputError(f"its head has {len(starts)} linear layers; expected 0 (the backbone) to {len(starts)}")
    return nn.Sequential(*list(head)[: [*starts, len(head)][number] if number else 0])


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def _words(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"linear {layer.in_features} {layer.out_features}{' bias' * (layer.bias is not None)}"
    if isinstance(layer, _BatchNorm):
        return f"batchnorm {layer.num_features}{' scale' * layer.affine}"
    if isinstance(layer, nn.ReLU | nn.GELU):
        return type(layer).__name__.lower()
    raise InputError(f"a head with a {type(layer).__name__} cannot be kept; use layer 0, the backbone")


def _last_width(layers: Sequence[str]) -> int:
    found = _LAYER.fullmatch(layers[-1]) if layers else None
    return int(found[3]) if found and found[1] else 0


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _opened(path: Path) -> Any:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; pass the file that `largescale finetune RUN OUT.safetensors` wrote")
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole file of safetensors ({' '.join(str(error).split())})") from error
