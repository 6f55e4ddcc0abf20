"""Planes of JPEGs: colours of other matrices beside float64, and odd sides."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from shards.clips.planes import as_jpeg_has_them, jpeg_of


def by_pixel(planes: list[np.ndarray], shares: tuple[float, float], is_full: bool) -> list[np.ndarray]:
    """The same by way of RGB, pixel by pixel, in float64."""
    red, blue = shares
    low, luma_span, chroma_span = (0, 255, 255) if is_full else (16, 219, 224)
    found = [np.zeros(plane.shape) for plane in planes]
    for y, x in np.ndindex(*planes[0].shape):
        luma = (float(planes[0][y, x]) - low) / luma_span
        cb, cr = ((float(plane[y // 2, x // 2]) - 128) / chroma_span for plane in planes[1:])
        r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
        g = (luma - red * r - blue * b) / (1 - red - blue)
        jpeg = 0.299 * r + 0.587 * g + 0.114 * b
        found[0][y, x] = 255 * jpeg
        found[1][y // 2, x // 2] = 128 + 255 * (b - jpeg) / 1.772
        found[2][y // 2, x // 2] = 128 + 255 * (r - jpeg) / 1.402
    return found


@pytest.mark.parametrize("shares", [(0.2126, 0.0722), (0.2627, 0.0593)])
@pytest.mark.parametrize("is_full", [False, True])
def test_colours_of_another_matrix_are_those_of_float64_loops(shares, is_full):
    rng, height, width = np.random.default_rng(0), 17, 22
    shapes = [(height, width), *[((height + 1) // 2, (width + 1) // 2)] * 2]
    planes = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    found = as_jpeg_has_them(tuple(planes), shares, is_full=is_full)
    for plane, expected in zip(found, by_pixel(planes, shares, is_full), strict=True):
        assert plane.dtype == np.uint8 and plane.shape == expected.shape
        assert np.abs(plane - np.clip(expected, 0, 255)).max() < 0.51


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47), (33, 47)])
def test_jpegs_of_odd_sizes_do_not_show_what_memory_holds_behind_them(height, width):
    """The bytes behind the plane differ, and those of the JPEG do not."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    chroma = np.full(((height + 1) // 2, (width + 1) // 2), 128, np.uint8)
    found = []
    for garbage in (0, 255):
        memory = np.full(height * width + 2 * width, garbage, np.uint8)
        memory[: height * width] = pixels.ravel()
        luma = memory[: height * width].reshape(height, width)
        found.append(jpeg_of((luma, chroma, chroma), 90))
    assert found[0] == found[1]
    shown = np.asarray(Image.open(io.BytesIO(found[0])).convert("L")).astype(int)
    assert shown.shape == (height, width) and np.abs(shown - pixels).mean() < 6
