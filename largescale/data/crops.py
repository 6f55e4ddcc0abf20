"""Multi-crop on the CPU: boxes from per-sample random numbers, antialiased resizes, uint8 out.

The box distribution is the random resized crop of the Inception papers as SwAV uses it (arXiv 2006.09882, section
3.3): an area uniform in `scale`, an aspect ratio log-uniform in `ratio`, up to ten attempts to fit, else the
largest centre box within the ratio.

An image that is much larger than its views is decoded at a half, a quarter or an eighth of its size. Its boxes are
then moved to the grid of the reduced pixels, so that they cut the same content from either image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from largescale.data.decode import REDUCTIONS

ATTEMPTS = 10
BOX_DRAWS = 2 * ATTEMPTS + 2
"""Uniform numbers that one box consumes."""


def sample_boxes(
    draws: np.ndarray, height: int, width: int, scale: np.ndarray, ratio: np.ndarray
) -> np.ndarray:
    """Crop boxes of the views of one image.

    Args:
        draws: uniform numbers, float64 [N, BOX_DRAWS].
        height, width: of the image in pixels.
        scale: smallest and largest share of the area, [2] or for each view [N, 2].
        ratio: smallest and largest width / height, likewise.

    Returns:
        int64 [N, 4]: top, left, height, width; always inside the image.
    """
    scale, ratio = (np.broadcast_to(np.asarray(limits, np.float64), (len(draws), 2)) for limits in (scale, ratio))
    area = height * width * (scale[:, :1] + draws[:, :ATTEMPTS] * (scale[:, 1:] - scale[:, :1]))
    logs = np.log(ratio)
    aspect = np.exp(logs[:, :1] + draws[:, ATTEMPTS : 2 * ATTEMPTS] * (logs[:, 1:] - logs[:, :1]))
    box_w, box_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_w >= 1) & (box_w <= width) & (box_h >= 1) & (box_h <= height)

    chosen, rows = fits.argmax(axis=1), np.arange(len(draws))
    h, w = box_h[rows, chosen], box_w[rows, chosen]
    top, left = np.floor(draws[:, -2] * (height - h + 1)), np.floor(draws[:, -1] * (width - w + 1))
    boxes = np.stack([top, left, h, w], axis=1)
    if (failed := ~fits[rows, chosen]).any():
        h, w = _centre_box(height, width, ratio[failed])
        boxes[failed] = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    return boxes.astype(np.int64)


def _centre_box(height: int, width: int, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    aspect = width / height
    box_w = np.where(aspect > ratio[:, 1], np.rint(height * ratio[:, 1]), width)
    box_h = np.where(aspect < ratio[:, 0], np.rint(width / ratio[:, 0]), height)
    return box_h.clip(1, height), box_w.clip(1, width)


def reduction(boxes: np.ndarray, sizes: np.ndarray, margin: float) -> int:
    """The largest reduction that leaves every box at least `margin` times as wide and high as its view.

    Args:
        boxes: of the views of an image, int64 [N, 4].
        sizes: side of each view in pixels, [N].
        margin: above this the views of both images are alike (see docs/data.md for the error); 0 never reduces.

    Returns:
        1 or one of REDUCTIONS.
    """
    if margin <= 0:
        return 1
    spare = (boxes[:, 2:].min(axis=1) / sizes).min()
    return next((factor for factor in REDUCTIONS if spare >= margin * factor), 1)


def on_grid(boxes: np.ndarray, factor: int, height: int, width: int) -> np.ndarray:
    """Boxes [N, 4] of an image moved to the grid of its reduced pixels, and counted in these: int64 [N, 4]."""
    ends = boxes[:, :2] + boxes[:, 2:]
    starts = np.rint(boxes[:, :2] / factor).astype(np.int64)
    limits = np.array([-(-height // factor), -(-width // factor)])
    ends = np.clip(np.rint(ends / factor).astype(np.int64), starts + 1, limits)
    return np.concatenate([starts, ends - starts], axis=1)


def crop(image: Tensor, box: np.ndarray, size: int, out: Tensor) -> None:
    """Cut a box out of an image and resize it with antialiasing.

    Args:
        image: uint8 [3, H, W].
        box: top, left, height, width.
        size: side of the result in pixels.
        out: uint8 [1, 3, size, size], written to; channels last in memory, as the image, is fastest.
    """
    top, left, height, width = box.tolist()
    region = image[None, :, top : top + height, left : left + width]
    # What interpolate(..., mode="bilinear", antialias=True) calls, but without a result to be copied.
    torch.ops.aten._upsample_bilinear2d_aa.out(region, [size, size], False, None, None, out=out)
