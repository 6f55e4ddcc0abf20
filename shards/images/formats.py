"""What bytes are an image of, told from how they begin: suffixes lie."""

from __future__ import annotations

import re
from functools import cache

from PIL import features

HEAD_BYTES = 64
"""Bytes from which a format is told."""

_TIFF = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")
_PPM = re.compile(rb"P(?:[1-6fy]|0CMYK|yRGBA)[\s#]")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_AVIF = (b"avif", b"avis")
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_JPEG_XL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")

FOREIGN = ("HEIC", "AVIF", "JPEG 2000", "JPEG XL")
"""Formats that shards do not hold, by the names that people know."""


def format_of(head: bytes) -> str:
    """The format that these first bytes begin: one of IMAGE_FORMATS, of FOREIGN, or empty for none that we know."""
    if head[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] in _TIFF:
        return "tiff"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if _PPM.match(head):
        return "ppm"
    return _foreign(head)


def needs(name: str) -> str:
    """What an image of a foreign format needs to be stored, as the reason why it is left out."""
    if name not in ("HEIC", "AVIF"):
        return f"format {name} is not supported: convert it to PNG or JPEG first"
    if name == "HEIC" and not can_read("HEIC"):
        return "format HEIC needs pip install 'largescale[heif]' and shards convert --plain"
    if not can_read(name):
        return f"format {name} needs a newer Pillow and shards convert --plain"
    return f"format {name} needs shards convert --plain"


@cache
def can_read(name: str) -> bool:
    """Whether a foreign format can be read, by Pillow or by an optional library."""
    if name == "AVIF":
        return bool(features.check("avif"))
    if name != "HEIC":
        return False
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _foreign(head: bytes) -> str:
    if head.startswith(_JPEG_2000):
        return "JPEG 2000"
    if head.startswith(_JPEG_XL):
        return "JPEG XL"
    if head[4:8] != b"ftyp":
        return ""
    end = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[place : place + 4] for place in range(16, end - 3, 4))]
    if any(brand in _AVIF for brand in brands):
        return "AVIF"
    return "HEIC" if any(brand in _HEIC for brand in brands) else ""
