"""Multi-crop on the CPU: boxes from per-sample random numbers, antialiased resizes, uint8 out.

The box distribution is the random resized crop of the Inception papers as SwAV uses it (arXiv 2006.09882, section
3.3): an area uniform in `scale`, an aspect ratio log-uniform in `ratio`, up to ten attempts to fit, else the
largest centre box within the ratio.

Boxes are those of the upright image, whatever it is stored like. An image that is much larger than its views is decoded
at a half, a quarter or an eighth of its size, as it is stored: its boxes are then moved to the grid of these pixels, so
that they cut the same content, and the views that come out are turned.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from largescale.data.decode import REDUCTIONS
from shards.images.orientation import MIRRORED, SIDEWAYS, UPSIDE_DOWN

ATTEMPTS = 10
BOX_DRAWS = 2 * ATTEMPTS + 2
"""Uniform numbers that one box consumes."""


class BoxSampler:
    """Draws the crop boxes of all views of an image at once.

    Args:
        scale: smallest and largest share of the area, for each view [V, 2].
        ratio: smallest and largest width / height, likewise.
    """

    def __init__(self, scale: np.ndarray, ratio: np.ndarray) -> None:
        self._ratio = np.asarray(ratio, np.float64)
        scale, logs = np.asarray(scale, np.float64), np.log(self._ratio)
        self._scale, self._scale_range = scale[:, :1], scale[:, 1:] - scale[:, :1]
        self._log, self._log_range = logs[:, :1], logs[:, 1:] - logs[:, :1]
        self._views = np.arange(len(scale))

    def __call__(self, draws: np.ndarray, height: int, width: int) -> np.ndarray:
        """The boxes.

        Args:
            draws: uniform numbers, float64 [V, BOX_DRAWS].
            height, width: of the image in pixels.

        Returns:
            int64 [V, 4]: top, left, height, width; always inside the image.
        """
        area = height * width * (self._scale + draws[:, :ATTEMPTS] * self._scale_range)
        aspect = np.exp(self._log + draws[:, ATTEMPTS : 2 * ATTEMPTS] * self._log_range)
        box_w, box_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (box_w >= 1) & (box_w <= width) & (box_h >= 1) & (box_h <= height)

        chosen = fits.argmax(axis=1)
        boxes = np.empty((len(draws), 4), np.int64)
        boxes[:, 2] = h = box_h[self._views, chosen]
        boxes[:, 3] = w = box_w[self._views, chosen]
        boxes[:, 0] = draws[:, -2] * (height - h + 1)  # rounded down
        boxes[:, 1] = draws[:, -1] * (width - w + 1)
        if not (fitting := fits[self._views, chosen]).all():
            failed = ~fitting
            h, w = _centre_box(height, width, self._ratio[failed])
            boxes[failed] = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
        return boxes


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


def as_stored(boxes: np.ndarray, orientation: int, height: int, width: int) -> np.ndarray:
    """Boxes [N, 4] of an upright image of this height and width as they lie in what is stored, not turned yet."""
    boxes = boxes.copy()
    if orientation in UPSIDE_DOWN:
        boxes[:, 0] = height - boxes[:, 0] - boxes[:, 2]
    if orientation in MIRRORED:
        boxes[:, 1] = width - boxes[:, 1] - boxes[:, 3]
    return boxes[:, [1, 0, 3, 2]] if orientation in SIDEWAYS else boxes


def turn(view: Tensor, orientation: int) -> None:
    """Turn a square view [..., S, S] that was cut from what is stored; in place."""
    turned = view.transpose(-1, -2) if orientation in SIDEWAYS else view
    view.copy_(turned.flip([side for side, flipped in ((-2, UPSIDE_DOWN), (-1, MIRRORED)) if orientation in flipped]))


_resize: Callable[..., Tensor] = torch._C._nn._upsample_bilinear2d_aa
"""What interpolate(..., mode="bilinear", antialias=True) calls; here without a result that would have to be copied."""


def crop(image: Tensor, box: list[int], size: int, out: Tensor) -> None:
    """Cut a box out of an image and resize it with antialiasing.

    Args:
        image: uint8 [3, H, W].
        box: top, left, height, width.
        size: side of the result in pixels.
        out: uint8 [1, 3, size, size], written to; channels last in memory, as the image, is fastest.
    """
    top, left, height, width = box
    region = image[None, :, top : top + height, left : left + width]
    _resize(region, [size, size], False, None, None, out=out)
