"""Detection that tests can afford: few regions, a narrow pyramid, one size."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import shards
from largescale.config import load_config
from largescale.data.corpora import Corpus
from largescale.evaluate.detection import Settings
from largescale.evaluate.extract import load_method
from largescale.evaluate.image_training import Trial
from shards.format.manifest import read_manifest
from tests.helpers.commands import ROOT


def small(**others: Any) -> Settings:
    """Settings for scenes."""
    few: dict[str, Any] = {
        "detection_epochs": 1,
        "detection_sizes": [32],
        "detection_size": 32,
        "detection_width": 4,
        "detection_regions": 8,
        "detection_anchor": 3.0,
    }
    return Settings(**few | others)


def trial_of(folders: tuple[Path, Path], *overrides: str) -> Trial:
    """A tiny network to train on scenes."""
    config = load_config(ROOT / "tests/tiny.yaml", [f"data.shards={folders[0]}", "data.audit=false", *overrides])
    train, test = (Corpus(read_manifest(folder)) for folder in folders)
    return Trial(config, load_method(config, None), train, test, str(folders[0]), Path(), torch.device("cpu"))


def write(folder: Path, members: list[bytes | None], width: int = 8, height: int = 8) -> Path:
    """A shard folder of black images with these `json` members."""
    folder.mkdir()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(buffer, "PNG")
    with tarfile.open(folder / "a-000000.tar", "w") as file:
        for number, member in enumerate(members):
            payloads = {"json": member, "png": buffer.getvalue()}
            for suffix, payload in payloads.items():
                if payload is not None:
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(payload)
                    file.addfile(info, io.BytesIO(payload))
    shards.index(folder, workers=1)
    return folder


def member(*objects: Any, field: str = "annotations") -> bytes:
    """A member that lists objects."""
    return json.dumps({field: objects}).encode()
