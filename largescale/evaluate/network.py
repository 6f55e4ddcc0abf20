"""A trained network for other programs: what evaluation sees, in evaluation mode and without gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from largescale.checkpoint.folder import Checkpoint, open_checkpoint
from largescale.config import Config
from largescale.config.loading import config_of_values
from largescale.data.centre_crops import centre_crop
from largescale.evaluate.extract import load_method
from largescale.evaluate.targets import read_newest
from shards.ground.errors import InputError


class Network(nn.Module):
    """A trained network.

    Attributes:
        config: what it was trained with.
        step: of the checkpoint, counted from 0.
        num_features: width of what `encode` gives.
        method: all of it, projection heads included.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.config, self.step = config, checkpoint.step
        self.method = load_method(config, checkpoint)
        self.num_features = self.method.num_features
        self.register_buffer("mean", torch.tensor(config.data.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.data.std)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, num_features] of normalised images [B, 3, H, W] (see `prepare`)."""
        return self.method.encode(images)

    forward = encode

    def prepare(self, image: Tensor) -> Tensor:
        """An image uint8 [3, H, W] as evaluation feeds it: resized and centre-cropped as `evaluate.resize` and
        `evaluate.size` say, normalised: float32 [3, S, S].
        """
        evaluate = self.config.evaluate
        cropped = centre_crop(image.to(self.mean.device), evaluate.resize, evaluate.size)
        return (cropped.float() / 255 - self.mean) / self.std


def load(run_or_checkpoint: str | Path) -> Network:
    """The network of a run, in evaluation mode, on the CPU, in float32; its parameters take no gradient.

    Args:
        run_or_checkpoint: folder of a run, whose newest whole checkpoint is taken, or of one of its checkpoints.

    Raises:
        InputError: neither of them, no whole checkpoint, or a damaged one.
    """
    path = Path(run_or_checkpoint).expanduser()
    if (path / "checkpoints").is_dir():
        return read_newest(path, _network_of)
    checkpoint = open_checkpoint(path)
    if checkpoint is None:
        raise InputError(
            f"{path}: no run and no checkpoint here; pass the folder that pretrain wrote, or one of those "
            f"in its checkpoints/"
        )
    if damage := checkpoint.damage():
        raise InputError(f"{checkpoint.path}: {damage}; take another checkpoint")
    return _network_of(checkpoint)


def _network_of(checkpoint: Checkpoint) -> Network:
    config = config_of_values(checkpoint.progress["config"], str(checkpoint.path))
    # Building it draws weights, which the checkpoint replaces; the caller's random numbers are left alone.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        return Network(config, checkpoint)
