"""What can be told from an image's bytes without torch, and images as everybody expects them: upright, RGB, 8 bits."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from shards.manifest import IMAGE_FORMATS

_CODES = {name.upper(): code for code, name in enumerate(IMAGE_FORMATS)} | {"MPO": IMAGE_FORMATS.index("jpeg")}

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned."""


@dataclass(frozen=True)
class ImageFacts:
    """Format code (position in IMAGE_FORMATS) and size in pixels, from the header."""

    format: int
    width: int
    height: int


class ImageError(Exception):
    """Bytes that are no usable image; the message is the reason, short and without values, so it can be counted."""


def inspect(payload: bytes, *, decode: bool) -> ImageFacts:
    """Read an image's header, and with `decode` all of its pixels.

    Raises:
        ImageError: empty, of no known format, cut, damaged, or of more pixels than are safe to decode.
    """
    with opened(payload) as image:
        if decode:
            image.load()
        return facts(image)


@contextmanager
def opened(payload: bytes) -> Iterator[Image.Image]:
    """An image whose header is read; whatever Pillow raises inside becomes an ImageError."""
    if not payload:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(payload)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ImageError("not an image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, IndexError) as error:
        raise ImageError("damaged or cut image") from error


def facts(image: Image.Image) -> ImageFacts:
    """Format and size of an open image.

    Raises:
        ImageError: a format that shards do not hold.
    """
    code = _CODES.get(image.format or "")
    if code is None:
        raise ImageError(f"format {image.format} is not supported")
    return ImageFacts(code, image.width, image.height)


def jpeg_facts(payload: bytes) -> ImageFacts | None:
    """The same of a JPEG, much faster; None for what is none, or is damaged."""
    if payload[:2] != b"\xff\xd8":
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(payload)
    except ValueError:
        return None
    return ImageFacts(IMAGE_FORMATS.index("jpeg"), width, height)


def is_plain(image: Image.Image) -> bool:
    """Whether it is upright, a single frame, grey or RGB of 8 bits: what every decoder shows alike."""
    return (image.mode in ("L", "RGB") and getattr(image, "n_frames", 1) == 1
            and image.getexif().get(ORIENTATION, 1) == 1)


def to_rgb(image: Image.Image, *, srgb: bool = False) -> Image.Image:
    """The first frame, upright, RGB of 8 bits: 16 bits scaled down, palettes resolved, what is transparent on white.

    Args:
        image: any mode.
        srgb: convert from the embedded colour profile.
    """
    profile = image.info.get("icc_profile") if srgb else None
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255.
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values / 257).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    if profile and image.mode in ("L", "RGB", "CMYK"):
        image = _from_profile(image, profile)
    return image.convert("RGB")


def _from_profile(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image  # a profile that is damaged, or of another colour space, says nothing
