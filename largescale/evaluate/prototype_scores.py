"""Cosines of some training samples to the prototypes of the first head, kept for the report's gallery."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.made_from import VERSION, Stamp
from shards.files import atomic_write

SAMPLES = 2048
"""Samples whose scores are kept."""


@dataclass(frozen=True)
class PrototypeScores:
    """Cosines [M, K], sample ids [M] int64, and the stamp of what they were made from."""

    scores: Tensor
    ids: Tensor
    made_from: Stamp


def path_of(run_dir: Path) -> Path:
    """Where the scores of a run are."""
    return run_dir / "eval" / "features" / "prototypes.safetensors"


@torch.no_grad()
def save(path: Path, method: Any, train: FeatureSet, device: torch.device, seed: int, made_from: Stamp) -> None:
    """Compute the scores of samples drawn by `seed`, and write them atomically."""
    chosen = np.random.default_rng(seed).permutation(len(train.ids))[:SAMPLES]
    rows = torch.from_numpy(np.sort(chosen))
    scores = method.prototypes(method.embed(train.features[rows].to(device)))[0].float().cpu()
    tensors = {"scores": scores.contiguous(), "ids": train.ids[rows]}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={"made_from": json.dumps(made_from)}))


def load(path: Path) -> PrototypeScores | None:
    """What `save` wrote; None where it is missing, damaged or without a stamp."""
    try:
        with safe_open(path, framework="pt") as file:
            made_from = json.loads(file.metadata()["made_from"])
            if made_from["version"] != VERSION:
                return None
            return PrototypeScores(file.get_tensor("scores"), file.get_tensor("ids"), made_from)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return None
