"""Multi-crop on the CPU: boxes from per-sample random numbers, antialiased resizes, uint8 out.

The box distribution is the random resized crop of the Inception papers as SwAV uses it (arXiv 2006.09882, section
3.3): an area uniform in `scale`, an aspect ratio log-uniform in `ratio`, up to ten attempts to fit, else the
largest centre box within the ratio.

An image that is much larger than its views is decoded at a half, a quarter or an eighth of its size. Its boxes are
then moved to the grid of the reduced pixels, so that they cut the same content from either image.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from largescale.data.decode import REDUCTIONS

ATTEMPTS = 10
BOX_DRAWS = 2 * ATTEMPTS + 2
"""Uniform numbers that one box consumes."""


def sample_boxes(
    draws: np.ndarray, height: np.ndarray, width: np.ndarray, scale: list[float], ratio: list[float]
) -> np.ndarray:
    """Crop boxes for a batch.

    Args:
        draws: uniform numbers, float64 [N, BOX_DRAWS].
        height, width: image sizes in pixels, int [N].
        scale: smallest and largest share of the area.
        ratio: smallest and largest width / height.

    Returns:
        int64 [N, 4]: top, left, height, width; always inside the image.
    """
    area = (height * width)[:, None] * (scale[0] + draws[:, :ATTEMPTS] * (scale[1] - scale[0]))
    log_low, log_high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(log_low + draws[:, ATTEMPTS : 2 * ATTEMPTS] * (log_high - log_low))
    box_w, box_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_w >= 1) & (box_w <= width[:, None]) & (box_h >= 1) & (box_h <= height[:, None])

    chosen, rows = fits.argmax(axis=1), np.arange(len(draws))
    fallback_h, fallback_w = _centre_box(height, width, ratio)
    any_fits = fits.any(axis=1)
    h = np.where(any_fits, box_h[rows, chosen], fallback_h)
    w = np.where(any_fits, box_w[rows, chosen], fallback_w)
    top = np.where(any_fits, np.floor(draws[:, -2] * (height - h + 1)), (height - h) // 2)
    left = np.where(any_fits, np.floor(draws[:, -1] * (width - w + 1)), (width - w) // 2)
    return np.stack([top, left, h, w], axis=1).astype(np.int64)


def _centre_box(height: np.ndarray, width: np.ndarray, ratio: list[float]) -> tuple[np.ndarray, np.ndarray]:
    aspect = width / height
    box_w = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width)
    box_h = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height)
    return np.clip(box_h, 1, height), np.clip(box_w, 1, width)


def reduction(boxes: list[np.ndarray], sizes: list[int], margin: float) -> int:
    """The largest reduction that leaves every box at least `margin` times as wide and high as its view.

    Args:
        boxes: of each crop group, int64 [N, 4].
        sizes: side of each group's views in pixels.
        margin: above this the views of both images are alike (see docs/data.md for the error); 0 never reduces.

    Returns:
        1 or one of REDUCTIONS.
    """
    if margin <= 0:
        return 1
    spare = min(float(group[:, 2:].min()) / size for group, size in zip(boxes, sizes, strict=True))
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
        out: uint8 [3, size, size], written to; fastest if its memory has the layout of the image's.
    """
    top, left, height, width = box.tolist()
    region = image[None, :, top : top + height, left : left + width]
    if (height, width) == (size, size):
        out.copy_(region[0])
    else:
        out.copy_(interpolate(region, (size, size), mode="bilinear", antialias=True)[0])
