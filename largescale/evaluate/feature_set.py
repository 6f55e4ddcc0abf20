"""Features of labelled samples, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shards.ground.errors import InputError
from shards.ground.files import atomic_write

_ABOUT = "about"


@dataclass(frozen=True)
class FeatureSet:
    """Features [N, D] float32, labels [N] int64, sample ids [N] int64 (position in the manifest), class names.

    `made_from` is the stamp of a file that they were read from (`evaluate/made_from.py`); empty for others.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    classes: tuple[str, ...]
    made_from: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path, made_from: dict[str, Any]) -> None:
        """Write as safetensors, atomically, with the stamp of what they were made from."""
        tensors = {name: getattr(self, name).contiguous() for name in ("features", "labels", "ids")}
        # One entry: safetensors writes several in random order, and equal features are to be equal files.
        about = json.dumps({"classes": self.classes, "made_from": made_from})
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={_ABOUT: about}))

    @staticmethod
    def load(path: Path) -> FeatureSet:
        """Read a file that `save` wrote.

        Raises:
            InputError: missing, damaged, or of a version that did not stamp them.
        """
        try:
            with safe_open(path, framework="pt") as file:
                features, labels, ids = (file.get_tensor(name) for name in ("features", "labels", "ids"))
                about = json.loads(file.metadata()[_ABOUT])
                return FeatureSet(features, labels, ids, tuple(about["classes"]), about["made_from"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not readable ({error}); delete it and evaluate again") from error
