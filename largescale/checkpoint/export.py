"""`largescale export`: the backbone of a checkpoint as one file that plain torch loads.

The file is safetensors. Its metadata says, as JSON where it is not plain text, how the network is built, what its input
must look like and which weights they are; docs/export.md explains each entry.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from largescale.checkpoint import sharded, torchvision_layout
from largescale.checkpoint.folder import Checkpoint, newest_first
from largescale.config import ModelConfig
from largescale.models.backbones import build_backbone
from shards.ground.errors import InputError
from shards.ground.files import atomic_write

FORMATS = ("torchvision",)
VERSION = 1

_BACKBONE = "model.backbone."
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
class Exported:
    """A file that was written.

    Attributes:
        path: of the file.
        metadata: what it says about itself.
        num_tensors, num_bytes: what it holds.
    """

    path: Path
    metadata: dict[str, str]
    num_tensors: int
    num_bytes: int


def export(run_dir: Path, out: Path, *, format_name: str = "torchvision", step: int | None = None) -> Exported:
    """Write the backbone of a run's checkpoint to `out`, atomically. Neither its shards nor a GPU are needed.

    Args:
        run_dir: folder of the run.
        out: file to write, ending in .safetensors.
        format_name: names of the tensors: one of FORMATS.
        step: of the checkpoint; None takes the newest whole one.

    Raises:
        InputError: another format, no such checkpoint, a damaged one, or a backbone that the format has no place for.
    """
    if format_name not in FORMATS:
        raise InputError(f"--format={format_name}: this version exports {', '.join(FORMATS)}")
    if out.suffix != ".safetensors" or out.is_dir():
        raise InputError(f"{out}: expected an output file ending in .safetensors, such as backbone.safetensors")
    checkpoint = _choose(run_dir, step)
    config = checkpoint.progress["config"]
    known = {item.name for item in fields(ModelConfig)}
    model = ModelConfig(
        **{
            key.removeprefix("model."): value
            for key, value in config.items()
            if key.startswith("model.") and key.removeprefix("model.") in known
        }
    )
    torchvision_layout.check(model)
    with torch.device("meta"):
        backbone, num_features = build_backbone(model)
    tensors = {
        torchvision_layout.name_of(backbone, name): tensor for name, tensor in _read(checkpoint, backbone).items()
    }
    stem_width = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d)).out_channels
    metadata = {
        "format": "pt",  # what readers of other libraries look for
        "largescale_export": str(VERSION),
        "layout": format_name,
        "architecture": model.backbone,
        "build": torchvision_layout.build_lines(model, stem_width),
        "num_features": str(num_features),
        "step": str(checkpoint.step),
        "weights": checkpoint.content_hash,
        "mean": json.dumps(config["data.mean"]),
        "std": json.dumps(config["data.std"]),
        "config": json.dumps({key: value for key, value in config.items() if key.startswith(_TOLD)}),
    }
    with atomic_write(out) as file:
        file.writelines(_in_order(safetensors.torch.save(tensors, metadata=metadata)))
    return Exported(out, metadata, len(tensors), out.stat().st_size)


def _in_order(content: bytes) -> list[bytes | memoryview]:
    """Parts of the same safetensors file with its metadata sorted: the library writes them in random order, and exports
    of the same weights are to be equal files.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return [len(text).to_bytes(8, "little"), text, memoryview(content)[end:]]


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


def _read(checkpoint: Checkpoint, backbone: nn.Module) -> dict[str, Tensor]:
    """The backbone's tensors on the host, those of floating point in float32."""
    stored: dict[str, Any] = {
        f"{_BACKBONE}{name}": torch.empty(tensor.shape, dtype=_stored_dtype(checkpoint, tensor))
        for name, tensor in backbone.state_dict().items()
    }
    try:
        sharded.load(checkpoint, stored, no_dist=True)
    except Exception as error:
        if checkpoint.path.exists():
            raise
        raise InputError(
            f"{checkpoint.path}: was removed while being read, since the run is still going; run the "
            f"command again, or raise checkpoint.keep"
        ) from error
    found = {name.removeprefix(_BACKBONE): value for name, value in stored.items()}
    bad = [name for name, value in found.items() if not value.isfinite().all()]
    if bad:
        _log.warning("%s: %s is not finite: these weights have diverged", checkpoint.path, bad[0])
    return {name: (value.float() if value.is_floating_point() else value).contiguous() for name, value in found.items()}


def _stored_dtype(checkpoint: Checkpoint, tensor: Tensor) -> torch.dtype:
    double = checkpoint.progress["config"]["train.precision"] == "fp64"
    return torch.float64 if double and tensor.is_floating_point() else tensor.dtype
