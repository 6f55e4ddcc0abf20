from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from largescale.data.decode import decode
from largescale.data.reader import RawSample, SampleError


def picture(mode: str = "RGB") -> Image.Image:
    ramp = np.linspace(0, 255, 40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


def encoded(image: Image.Image, form: str, **options: object) -> RawSample:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return RawSample(memoryview(buffer.getvalue()), image.width, image.height)


@pytest.mark.parametrize(
    "form, mode",
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("PNG", "1"),
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
    ],
)
def test_every_format_becomes_rgb_bytes(form, mode):
    image = picture(mode)
    pixels = decode(encoded(image, form), max_pixels=10**6)
    assert tuple(pixels.shape) == (3, 40, 30)
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 3


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees
    upright = decode(encoded(picture(), "JPEG", quality=95), max_pixels=10**6).permute(1, 2, 0).numpy()
    turned = decode(encoded(picture(), "JPEG", quality=95, exif=exif), max_pixels=10**6).permute(1, 2, 0).numpy()
    assert turned.shape == (30, 40, 3)
    assert np.abs(np.rot90(upright, -1).astype(int) - turned).mean() < 2


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_cut_and_foreign_bytes_are_sample_errors(form):
    whole = encoded(picture(), form)
    for payload in (whole.payload[: len(whole.payload) // 2], memoryview(b"no image"), memoryview(b"")):
        with pytest.raises(SampleError, match="cannot be decoded"):
            decode(RawSample(payload, 30, 40), max_pixels=10**6)
