"""Features of labelled samples, in memory and on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shards.errors import InputError
from shards.files import atomic_write


@dataclass(frozen=True)
class FeatureSet:
    """Features [N, D] float32, labels [N] int64, sample ids [N] int64 (position in the manifest), class names."""

    features: Tensor
    labels: Tensor
    ids: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path) -> None:
        """Write as safetensors, atomically."""
        tensors = {name: getattr(self, name).contiguous() for name in ("features", "labels", "ids")}
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={"classes": json.dumps(self.classes)}))

    @staticmethod
    def load(path: Path) -> FeatureSet:
        """Read a file that `save` wrote.

        Raises:
            InputError: missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tensors = [file.get_tensor(name) for name in ("features", "labels", "ids")]
                return FeatureSet(*tensors, tuple(json.loads(file.metadata()["classes"])))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not readable ({error}); delete it and evaluate again") from error
