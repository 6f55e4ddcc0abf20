"""What can be told from an image's bytes without torch, and images as everybody expects them: upright, RGB, 8 bits."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from shards.manifest import IMAGE_FORMATS

_CODES = {name.upper(): code for code, name in enumerate(IMAGE_FORMATS)} | {"MPO": IMAGE_FORMATS.index("jpeg")}
_PILLOW_FORMATS = tuple(name.upper() for name in IMAGE_FORMATS)

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned."""

MAX_PIXELS = 178_956_970
"""Pixels up to which an image is opened unless another limit is given: 512 MB as RGB."""

# Ours is the limit, looked at when a header is read: Pillow's own would hold against a larger --max-pixels.
Image.MAX_IMAGE_PIXELS = None

_BITS_PER_SAMPLE = 258
_ALPHA = ("LA", "PA", "La", "RGBa", "RGBA")


@dataclass(frozen=True)
class ImageFacts:
    """Format code (position in IMAGE_FORMATS) and size in pixels, from the header."""

    format: int
    width: int
    height: int


class ImageError(Exception):
    """Bytes that are no usable image; the message is the reason, short and without values, so it can be counted."""


def inspect(payload: bytes, *, decode: bool, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Read an image's header, and with `decode` all of its pixels.

    Raises:
        ImageError: empty, of no known format, cut, damaged, or of more pixels than `max_pixels`.
    """
    with opened(payload, max_pixels=max_pixels) as image:
        if decode:
            image.load()
        return facts(image)


@contextmanager
def opened(payload: bytes, *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image whose header is read; whatever Pillow raises inside becomes an ImageError.

    Args:
        payload: its bytes.
        max_pixels: it is refused if it has more, before any of them is decoded; 0 is no limit.
    """
    if not payload:
        raise ImageError("empty file")
    try:
        # No other format is tried: Pillow starts Ghostscript for EPS, whatever the file's name.
        with Image.open(io.BytesIO(payload), formats=_PILLOW_FORMATS) as image:
            if max_pixels and image.width * image.height > max_pixels:
                raise ImageError("too many pixels")
            yield image
    except UnidentifiedImageError as error:
        avif = payload[4:8] == b"ftyp"  # or HEIC; crawls have many under other names
        raise ImageError("format AVIF or HEIC is not supported" if avif else "not an image") from error
    except MemoryError as error:
        raise ImageError("too many pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, IndexError) as error:
        raise ImageError("damaged or cut image") from error


def facts(image: Image.Image) -> ImageFacts:
    """Format and size of an open image."""
    return ImageFacts(_CODES[image.format or ""], image.width, image.height)


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
    """Whether it is upright, a single frame, grey or RGB of 8 bits: what every decoder shows alike.

    Args:
        image: opened, and not decoded yet: what it is decoded to has 8 bits in any case.
    """
    return (image.mode in ("L", "RGB") and "transparency" not in image.info and not _is_deep(image)
            and getattr(image, "n_frames", 1) == 1 and image.getexif().get(ORIENTATION, 1) == 1)


def _is_deep(image: Image.Image) -> bool:
    """Whether a file has more than 8 bits a channel, of which Pillow keeps 8 where it has three channels."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
    # What a decoder is told: of a 16-bit PNG "RGB;16B", of a PPM its highest value.
    how = [tile[3] for tile in image.tile]
    if image.format == "PPM":
        return any(isinstance(arguments, tuple) and arguments[1] > 255 for arguments in how)
    return image.format == "PNG" and any(";16" in arguments for arguments in how)


def to_rgb(image: Image.Image, *, srgb: bool = False) -> Image.Image:
    """The first frame, upright, RGB of 8 bits: more bits scaled down, palettes resolved, what is transparent on white.

    Args:
        image: any mode.
        srgb: convert from the embedded colour profile.
    """
    profile = image.info.get("icc_profile") if srgb else None
    image = ImageOps.exif_transpose(image)
    if has_deep_mode(image):
        image = Image.fromarray(np.rint(scaled(image, 255)).astype(np.uint8))
    image = _on_white(image)
    return (from_profile(image, profile) if profile else image).convert("RGB")


def has_deep_mode(image: Image.Image) -> bool:
    """Whether its pixels are whole numbers of 16 or 32 bits, or floats; Pillow clips those where it converts them."""
    return image.mode.startswith("I") or image.mode == "F"


def scaled(image: Image.Image, top: int) -> np.ndarray:
    """Pixels of an image of `has_deep_mode` as numbers from 0 to `top`, float32.

    Whole numbers are taken to go up to 65535, floats up to the first of 1, 255 and 65535 that none exceeds. Images with
    numbers beyond 65535, or below 0, are stretched from their lowest to their highest.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    limits = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    limit = next((limit for limit in limits if high <= limit), None)
    if low < 0 or limit is None:
        values, limit = values - low, max(high - low, 1.0)
    return values * (top / limit)


def _on_white(image: Image.Image) -> Image.Image:
    """Palettes resolved, and what is transparent laid on white, in the colour space that the image has."""
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image.convert("RGB") if image.mode == "P" else image
    grey = image.mode in ("1", "L", "LA", "La")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB").getchannel("R") if grey else image.convert("RGB")


def from_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """An image's colours in sRGB; as they are if the profile is damaged, or of another colour space."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image
