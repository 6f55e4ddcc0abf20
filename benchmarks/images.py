"""Images made by code for measurements: the size, detail and bytes of ordinary photographs, without anybody's licence.

Dead leaves (overlapping discs whose radii follow a power law; Lee, Mumford & Huang 2001) have the edge and scale
statistics of natural images; 1/f texture adds the fine detail that decides how many bytes a JPEG takes.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

TEXTURE = 10.0
"""Standard deviation of the texture in grey values; with it a photograph takes about 104 KB."""


def dead_leaves(height: int, width: int, rng: np.random.Generator, texture: float = TEXTURE) -> np.ndarray:
    """One image, uint8 [H, W, 3]."""
    image = np.full((height, width, 3), 128.0, np.float32)
    rows, columns = np.ogrid[:height, :width]
    for _ in range(height * width // 400):
        radius = min(3.0 * rng.random() ** -0.5, height / 3)
        y, x = rng.random() * height, rng.random() * width
        box = (slice(max(0, int(y - radius)), int(y + radius) + 2), slice(max(0, int(x - radius)), int(x + radius) + 2))
        inside = (rows[box[0]] - y) ** 2 + (columns[:, box[1]] - x) ** 2 < radius**2
        image[box][inside] = rng.normal(rng.uniform(40, 215), 20, 3)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    grain = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**0.8, s=(height, width))
    image += (texture * grain / grain.std())[..., None]
    return image.clip(0, 255).astype(np.uint8)


def photograph(number: int, *, seed: int = 0, scale: float = 1.0) -> bytes:
    """A JPEG of the size of ImageNet's (times `scale`): short side 375 to 500 pixels, quality 90, 4:2:0."""
    rng = np.random.default_rng([seed, number])
    height, width = (int(scale * side) for side in (rng.integers(375, 500), rng.integers(500, 650)))
    stored = io.BytesIO()
    Image.fromarray(dead_leaves(height, width, rng)).save(stored, "JPEG", quality=90)
    return stored.getvalue()


def write_photographs(folder: Path, count: int, *, seed: int = 0, scale: float = 1.0) -> int:
    """Write photographs 0 to `count` - 1.

    Returns:
        Bytes of all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for number in range(count):
        stored = photograph(number, seed=seed, scale=scale)
        (folder / f"{number:06d}.jpg").write_bytes(stored)
        total += len(stored)
    return total
