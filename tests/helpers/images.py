"""Small images as files hold them, and their metadata."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image


def image_bytes(width: int = 9, height: int = 7, file_format: str = "PNG", seed: int = 0) -> bytes:
    """A file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


PNG = [image_bytes(seed=number) for number in range(12)]
"""Files that differ."""


def exif_block(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """EXIF of entries (tag, type, count, the four bytes of the value), as a JPEG has it."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + head + body + bytes(4)


def with_exif(jpeg: bytes, *blocks: bytes) -> bytes:
    """A JPEG with blocks of metadata at its head."""
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block for block in blocks)
    return jpeg[:2] + segments + jpeg[2:]


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """An image as the bytes of a file; `options` are those of Pillow's `save`."""
    stored = io.BytesIO()
    image.save(stored, file_format, **options)
    return stored.getvalue()


def ramp(width: int = 64, height: int = 48) -> np.ndarray:
    """A picture with no symmetry, so that turning and colour mistakes show."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x % 256, 5 * y % 256, (x + 2 * y) % 256], axis=2).astype(np.uint8)
