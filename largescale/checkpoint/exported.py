"""What is exported of a run's checkpoint: the network that its method wants to be used, with all that describes it."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import Checkpoint, newest_first
from largescale.checkpoint.mask_file import hash_of, read_mask
from largescale.config import Config
from largescale.config.loading import config_of_values
from largescale.methods import build_method
from shards.ground.errors import InputError

VERSION = 1

_TOLD = (
    "name",
    "method.name",
    "model.",
    "data.mean",
    "data.std",
    "data.crops",
    "train.precision",
    "evaluate.resize",
    "evaluate.size",
)
"""Keys (or groups) of the run's configuration that travel with the weights."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """The network to export, in evaluation mode, on the CPU, in float32.

    Attributes:
        run_dir: of the run.
        checkpoint: whose weights they are.
        config: what it was trained with, as far as this version knows it.
        values: the same by key, as the checkpoint has them.
        backbone: images [B, 3, S, S] to features [B, num_features].
        head: features to embeddings; None where it is not exported.
        num_features: width of the backbone's features.
    """

    run_dir: Path
    checkpoint: Checkpoint
    config: Config
    values: dict[str, Any]
    backbone: nn.Module
    head: nn.Module | None
    num_features: int

    @property
    def whole(self) -> nn.Module:
        """Backbone, and head if there is one."""
        return self.backbone if self.head is None else nn.Sequential(self.backbone, self.head).eval()

    def images(self, num: int) -> Tensor:
        """Random input of the size that evaluation uses, the same at every call."""
        size = self.config.evaluate.size
        return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))

    def about(self) -> dict[str, str]:
        """What every format says of it: plain text or JSON by name; docs/export.md explains each entry."""
        values, evaluate = self.values, self.config.evaluate
        return {
            "format": "pt",  # what readers of other libraries look for
            "largescale_export": str(VERSION),
            "architecture": self.config.model.backbone,
            "num_features": str(self.num_features),
            "head": "none" if self.head is None else "projection",
            "step": str(self.checkpoint.step),
            "weights": self.checkpoint.content_hash,
            "data": str(self.checkpoint.progress.get("data", "")),
            "config_sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest(),
            "mean": json.dumps(values["data.mean"]),
            "std": json.dumps(values["data.std"]),
            "colors": "RGB",
            "input_size": json.dumps([3, evaluate.size, evaluate.size]),
            "resize": str(evaluate.resize),
            "interpolation": "bilinear, antialiased",
            "config": json.dumps({key: value for key, value in values.items() if key.startswith(_TOLD)}),
        }


def read_network(run_dir: Path, step: int | None, *, head: bool) -> Network:
    """Read the network to export from a checkpoint; nothing else of it is read.

    Args:
        run_dir: folder of the run.
        step: of the checkpoint; None takes the newest whole one.
        head: whether the projection head is exported too.

    Raises:
        InputError: no such checkpoint, a damaged one, or a method without a head.
    """
    checkpoint = _choose(run_dir, step)
    values = checkpoint.progress["config"]
    config = config_of_values(values, str(checkpoint.path))
    method = build_method(config, on_meta=True)
    if head and not method.head_name:
        raise InputError(f"--head: method.name={config.method.name} has no projection head")
    names = [method.encoder_name, *([method.head_name] if head else [])]
    modules = [method.get_submodule(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        module.load_state_dict(_read(checkpoint, f"model.{name}.", module), strict=True, assign=True)
        module.eval().requires_grad_(False)
    return Network(run_dir, checkpoint, config, values, modules[0], modules[1] if head else None, method.num_features)


def masks_of(network: Network) -> dict[str, Tensor]:
    """What of a network was trained, for a run with `model.mask`; also where its folder was moved with the file in it.

    Raises:
        InputError: the file is not there, or is not the mask that the run was trained with.
    """
    config = network.config
    beside = network.run_dir / Path(config.model.mask).name
    if not Path(config.model.mask).exists() and beside.is_file():
        config = replace(config, model=replace(config.model, mask=str(beside)))
    masks = read_mask(config)
    if hash_of(masks) != network.checkpoint.progress.get("mask", {}).get("sha256"):
        raise InputError(
            f"model.mask={config.model.mask}: not the mask that {network.run_dir} was trained with; restore that file"
        )
    return masks


def _choose(run_dir: Path, step: int | None) -> Checkpoint:
    there = newest_first(run_dir / "checkpoints")
    for checkpoint in there:
        if step not in (None, checkpoint.step):
            continue
        damage = checkpoint.damage()
        if not damage:
            return checkpoint
        if step is not None:
            raise InputError(f"{checkpoint.path}: {damage}; choose another --step")
        _log.warning("%s: %s; taking the one before", checkpoint.path, damage)
    steps = ", ".join(str(checkpoint.step) for checkpoint in there)
    if step is not None:
        raise InputError(f"{run_dir}: no checkpoint of step {step}; there are {steps or 'none'}")
    raise InputError(f"{run_dir}: no whole checkpoint; run `largescale pretrain` with this run.dir first")


def _read(checkpoint: Checkpoint, prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors on the host, those of floating point in float32."""
    stored: dict[str, Any] = {
        f"{prefix}{name}": torch.empty(tensor.shape, dtype=_stored_dtype(checkpoint, tensor))
        for name, tensor in module.state_dict().items()
    }
    sharded.load(checkpoint, stored, no_dist=True)
    found = {name.removeprefix(prefix): value for name, value in stored.items()}
    bad = [name for name, value in found.items() if not value.isfinite().all()]
    if bad:
        _log.warning("%s: %s is not finite: these weights have diverged", checkpoint.path, bad[0])
    return {name: (value.float() if value.is_floating_point() else value).contiguous() for name, value in found.items()}


def _stored_dtype(checkpoint: Checkpoint, tensor: Tensor) -> torch.dtype:
    double = checkpoint.progress["config"]["train.precision"] == "fp64"
    return torch.float64 if double and tensor.is_floating_point() else tensor.dtype
