"""Scores of some training samples under the first head of the method, kept for the report's gallery."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from largescale.evaluate.feature_set import FeatureSet
from largescale.evaluate.made_from import VERSION, Stamp
from largescale.methods.method import Method
from shards.ground.files import atomic_write

SAMPLES = 2048
"""Samples whose scores are kept."""


@dataclass(frozen=True)
class Scores:
    """Scores [M, K], sample ids [M] int64, and the stamp of what they were made from."""

    scores: Tensor
    ids: Tensor
    made_from: Stamp


def path_of(run_dir: Path, name: str) -> Path:
    """Where the scores of a run are; `name` is what the method calls an output (`methods.method.Exemplars`)."""
    return run_dir / "eval" / "features" / f"{name}s.safetensors"


@torch.no_grad()
def save(path: Path, method: Method, train: FeatureSet, device: torch.device, seed: int, made_from: Stamp) -> None:
    """Compute the scores of samples drawn by `seed`, and write them atomically."""
    chosen = np.random.default_rng(seed).permutation(len(train.ids))[:SAMPLES]
    rows = torch.from_numpy(np.sort(chosen))
    scores = method.exemplar_scores(train.features[rows].to(device))[0].float().cpu()
    tensors = {"scores": scores.contiguous(), "ids": train.ids[rows]}
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={"made_from": json.dumps(made_from)}))


def load(path: Path) -> Scores | None:
    """What `save` wrote; None where it is missing, damaged or without a stamp."""
    try:
        with safe_open(path, framework="pt") as file:
            made_from = json.loads(file.metadata()["made_from"])
            if made_from["version"] != VERSION:
                return None
            return Scores(file.get_tensor("scores"), file.get_tensor("ids"), made_from)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        return None
