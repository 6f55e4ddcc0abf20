"""Prunings of a run of seconds, for tests."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from largescale.checkpoint import sharded
from largescale.checkpoint.folder import find_latest, open_checkpoint

RUN = [
    "train.steps=6",
    "train.precision=fp32",
    "checkpoint.every_steps=2",
    "checkpoint.keep_every=2",
    "data.audit=false",
    "optim.warmup_epochs=0",
]
HALF = ["--rate", "0.5"]


def state_of(folder: Path, step: int = 0) -> dict[str, Tensor]:
    path = folder / "checkpoints"
    checkpoint = open_checkpoint(path / f"step-{step:08d}") if step else find_latest(path)
    assert checkpoint is not None
    state = {name: torch.zeros(shape) for name, shape in sharded.shapes(checkpoint).items()}
    sharded.load(checkpoint, state, no_dist=True)
    return state


def masks_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "mask.safetensors")


def by_torch(state: dict[str, Tensor], masks: dict[str, Tensor], amount: float | int) -> dict[str, Tensor]:
    modules = {name: nn.Module() for name in masks}
    for name, module in modules.items():
        module.register_parameter("w", nn.Parameter(state[f"model.backbone.{name}"]))
        prune.custom_from_mask(module, "w", masks[name])
    prune.global_unstructured(
        [(module, "w") for module in modules.values()], pruning_method=prune.L1Unstructured, amount=amount
    )
    return {name: dict(module.named_buffers())["w_mask"].bool() for name, module in modules.items()}


def left(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def weights_written(out: Path) -> dict[str, bytes]:
    """Bytes of all masks and newest checkpoints."""
    files = [path for path in out.rglob("*.safetensors") if "eval" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def spoil(checkpoint: Path) -> None:
    """Change one byte of its weights."""
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
