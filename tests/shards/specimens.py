"""What an image of the zoo is, and what its formats are made with."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.helpers.images import exif_block

HEIGHT, WIDTH = 32, 40
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}
"""What each orientation does to an array, spelled out once more."""


@dataclass(frozen=True)
class Specimen:
    """An image, or what looks like one.

    Attributes:
        name: of its file.
        payload: its bytes.
        seen: how it is to be seen, uint8 [H, W, 3]; None if it cannot be.
        reason: why not.
        is_animated: whether it has further frames.
        headers_are_whole: whether only decoding shows that it cannot be seen.
        tolerance: mean error that its format allows.
        foreign: its format, if shards do not hold that: then it can be seen where it is stored anew.
    """

    name: str
    payload: bytes
    seen: np.ndarray | None
    reason: str = ""
    is_animated: bool = False
    headers_are_whole: bool = True
    tolerance: float = 1.0
    foreign: str = ""


def picture() -> np.ndarray:
    """float64 [H, W, 4] from 0 to 1, smooth, without a symmetry; the last is for transparency."""
    x = np.linspace(0, 1, WIDTH)[None].repeat(HEIGHT, 0)
    y = np.linspace(0, 1, HEIGHT)[:, None].repeat(WIDTH, 1)
    return np.stack([x, y, (x + 2 * y) / 3, 1 - x / 2], 2)


RGB = np.rint(picture()[..., :3] * 255).astype(np.uint8)
GREY = RGB[..., 0]
ALPHA = np.rint(picture()[..., 3] * 255).astype(np.uint8)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey or colour numbers to uint8 [H, W, 3]."""
    pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
    return pixels[..., None].repeat(3, 2) if pixels.ndim == 2 else pixels


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours [H, W] or [H, W, 3] laid on white."""
    share = (alpha / 255)[..., None] if colours.ndim == 3 else alpha / 255
    return as_rgb(colours * share + 255 * (1 - share))


def encoded(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    """An image in some format."""
    stored = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stored, form, **options)
    return stored.getvalue()


def pillows(payload: bytes) -> np.ndarray:
    """What Pillow shows of a clean image."""
    with Image.open(io.BytesIO(payload)) as image:
        return np.asarray(image.convert("RGB"))


def exif(orientation: int) -> bytes:
    """A clean EXIF block."""
    return exif_block([(0x112, 3, 1, struct.pack("<HH", orientation, 0))])


def odd_exif(orientation: int) -> dict[str, list[bytes]]:
    """EXIF blocks that say an orientation among other things that no library expects."""
    turn = (0x112, 3, 1, struct.pack("<HH", orientation, 0))
    return {
        "text": [exif_block([turn, (0x11A, 2, 3, b"72\0\0")])],
        "float": [exif_block([turn, (0x131, 11, 1, b"\0\0\xc0?")])],
        "long": [exif_block([(0x112, 4, 1, struct.pack("<I", orientation))])],
        "twice": [exif(orientation), exif(1)],
        "nested": [b"Exif\0\0" + exif(orientation)],
        "bigendian": [exif_block([(0x112, 3, 1, struct.pack(">HH", orientation, 0))], ">")],
        "lost": [exif_block([turn, (0x8769, 4, 1, b"\xff\xff\xff\x7f"), (0x10F, 2, 2**31, b"\xff" * 4)])],
        "unknown": [exif_block([turn, (0xFFFF, 99, 7, b"\1\2\3\4")])],
        "xmp": [b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % orientation],
        "large": [exif(orientation), *[b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)] * 17],
    }
