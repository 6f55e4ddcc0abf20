"""Small JPEGs of images, made on the device in the pass that makes their features."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from largescale.config import Config
from largescale.evaluate.extract import Network


def shrinking(config: Config, side: int) -> Network:
    """A network whose features are the small image itself, [B, 3 * side * side] from 0 to 255."""

    def shrink(images: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=images.device)[:, None, None] for values in (config.data.mean, config.data.std)
        )
        return (interpolate(images * std + mean, (side, side), mode="area") * 255).round().clamp(0, 255).flatten(1)

    return shrink


def jpegs(features: Tensor, side: int) -> list[bytes]:
    """What such a network gave [N, 3 * side * side] as JPEGs."""
    small = features.to(torch.uint8).view(-1, 3, side, side).permute(0, 2, 3, 1)
    return [_jpeg(pixels) for pixels in small.numpy()]


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
