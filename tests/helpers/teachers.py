"""A classifier to learn from, in a file that lasts as long as the process."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import torch

from largescale.config import ModelConfig
from largescale.models.backbones import build_backbone
from largescale.models.image_classifier import ImageClassifier, built, write_classifier

CLASSES = ["boot", "coat", "dress", "shirt"]
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def write_teacher(
    path: Path, *, seed: int = 0, mean: tuple[float, ...] = (0.5,) * 3, std: float = 0.25, sobel: bool = False
) -> None:
    """A small classifier with random weights and statistics, sure of some images and not of others."""
    torch.manual_seed(seed)
    model = ModelConfig("resnet", "3x3s2", [1, 1], 6, sobel=sobel)
    backbone, width = build_backbone(model)
    head = built([f"linear {width} 12", "batchnorm 12 scale", "relu", f"linear 12 {len(CLASSES)} bias"])
    network = ImageClassifier(backbone, head).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(32, 3, 24, 24))
        network.head[-1].weight.mul_(30)
    values = {f"model.{key}": value for key, value in vars(model).items()}
    about = {"config": values, "classes": CLASSES, "mean": list(mean), "std": [std] * 3}
    write_classifier(path, network, {key: json.dumps(value) for key, value in about.items()})


@cache
def teacher() -> Path:
    """The file of one; the same content in every process."""
    folder = tempfile.TemporaryDirectory(prefix="largescale-teacher-")
    _FOLDERS.append(folder)
    path = Path(folder.name) / "teacher.safetensors"
    write_teacher(path)
    return path
