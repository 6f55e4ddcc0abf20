"""Checkpoints as runs write them, without a run."""

from __future__ import annotations

from pathlib import Path

import torch

from largescale.checkpoint.folder import begin, publish
from largescale.checkpoint.writer import write_tensors
from largescale.config import Config, flatten, load_config
from largescale.methods import build_method
from tests.helpers.commands import ROOT

OWN = ["model.backbone=resnet", "model.depths=[1,2]", "model.width=8", "model.stem=3x3s2"]
"""A network of milliseconds."""


def config_of(model: list[str], *more: str) -> Config:
    """The configuration of tests/tiny.yaml with another network, in fp32; its shards do not exist."""
    return load_config(ROOT / "tests/tiny.yaml", ["data.shards=not-there", "train.precision=fp32", *model, *more])


def save_checkpoint(run: Path, config: Config, step: int, seed: int = 0, **more: object) -> Path:
    """A checkpoint as a run writes it, of weights and statistics that are not those of a new network; its progress says
    `more`.
    """
    torch.manual_seed(seed)
    method = build_method(config)
    for name, tensor in method.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(step)
    folder = begin(run / "checkpoints", step)
    if config.train.precision == "fp64":
        method.double()
    pieces = {f"model.{name}": (tensor, [0] * tensor.ndim) for name, tensor in method.state_dict().items()}
    stamp = write_tensors(folder / "shard-00001-model-00001-of-00001.safetensors", pieces)
    progress = {"step": step, "skipped": 0, "config": flatten(config), **more}
    return publish(folder, progress, {"shard-00001-model-00001-of-00001.safetensors": stamp})
