"""What is done to an image before it is stored: left out for a reason, passed on untouched, or made plain and small."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from shards.images import ImageError, ImageFacts, facts, is_plain, jpeg_facts, opened, to_rgb
from shards.manifest import IMAGE_FORMATS

_THUMBNAIL = 32
_FLAT_RANGE = 4
"""Grey values that a single-colour image may span: what JPEG makes of one colour."""


@dataclass(frozen=True)
class Cleaning:
    """Which images are kept, and how. Zero or False leaves a rule out.

    Attributes:
        min_side: pixels of the shorter side below which an image is left out.
        max_pixels: pixels above which it is left out, before it is decoded (decompression bombs).
        max_aspect: longer / shorter side above which it is left out.
        blank: leave out images of a single colour.
        animated: leave out images of several frames; else their first frame is what is seen.
        max_side: larger images are made smaller: their longer side gets so many pixels.
        quality: of the JPEGs that are written then.
        plain: store what is not plain (turned by EXIF, CMYK, 16 bits, palette, transparent, animated) as plain RGB.
        srgb: convert embedded colour profiles, of whatever is stored anew, to sRGB.
        decode: decode what is passed on untouched, to find damage.
    """

    min_side: int = 0
    max_pixels: int = 178_956_970
    max_aspect: float = 0.0
    blank: bool = False
    animated: bool = False
    max_side: int = 0
    quality: int = 90
    plain: bool = False
    srgb: bool = False
    decode: bool = True

    def apply(self, payload: bytes, suffix: str) -> tuple[bytes, str, ImageFacts]:
        """Clean one image.

        Args:
            payload: its bytes.
            suffix: of its file.

        Returns:
            The bytes to store and their suffix, the same if there is nothing to change, and what their header says.

        Raises:
            ImageError: it is left out; the reason.
        """
        if self._sizes_are_enough() and (header := jpeg_facts(payload)):
            self._check_size(header.width, header.height)
            return payload, suffix, header
        with opened(payload) as image:
            header = facts(image)
            self._check_size(*image.size)
            if self.animated and getattr(image, "n_frames", 1) > 1:
                raise ImageError("animated")
            large = self.max_side > 0 and max(image.size) > self.max_side
            profile = self.srgb and "icc_profile" in image.info
            if large or profile or (self.plain and not is_plain(image)):
                lossless = IMAGE_FORMATS[header.format] in ("png", "bmp", "tiff", "gif", "ppm") and not large
                pixels = self._pixels(payload, image, plain=not profile and is_plain(image))
                self._check_pixels(pixels)
                stored, suffix = _encode(pixels, self.quality, lossless=lossless)
                return stored, suffix, ImageFacts(IMAGE_FORMATS.index("png" if lossless else "jpeg"), *pixels.size)
            if self.blank:
                self._check_pixels(to_rgb(image))
            elif self.decode:
                image.load()
        return payload, suffix, header

    def _sizes_are_enough(self) -> bool:
        return not (self.decode or self.blank or self.animated or self.max_side or self.plain or self.srgb)

    def _check_size(self, width: int, height: int) -> None:
        if self.max_pixels and width * height > self.max_pixels:
            raise ImageError("too many pixels")
        if min(width, height) < self.min_side:
            raise ImageError("too small")
        if self.max_aspect and max(width, height) > self.max_aspect * min(width, height):
            raise ImageError("extreme aspect ratio")

    def _check_pixels(self, image: Image.Image) -> None:
        if self.blank and is_blank(image):
            raise ImageError("a single colour")

    def _pixels(self, payload: bytes, image: Image.Image, *, plain: bool) -> Image.Image:
        """The image as plain RGB, at most `max_side` long: reduced while it is decoded, then averaged over areas."""
        scaled_decode = plain and image.format == "JPEG"
        pixels = None if scaled_decode else to_rgb(image, srgb=self.srgb)
        size = pixels.size if pixels else image.size
        scale = min(1.0, self.max_side / max(size)) if self.max_side else 1.0
        width, height = (max(1, round(side * scale)) for side in size)
        if pixels is None:
            decoded = simplejpeg.decode_jpeg(payload, colorspace="RGB", min_height=height, min_width=width)
            pixels = Image.fromarray(decoded)
        return pixels if pixels.size == (width, height) else pixels.resize((width, height), Image.Resampling.BOX)


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB image has a single colour."""
    small = np.asarray(image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)).astype(int)
    return int((small.max((0, 1)) - small.min((0, 1))).max()) <= _FLAT_RANGE


def _encode(image: Image.Image, quality: int, *, lossless: bool) -> tuple[bytes, str]:
    if lossless:
        stored = io.BytesIO()
        image.save(stored, "PNG", icc_profile=None)
        return stored.getvalue(), "png"
    pixels = np.ascontiguousarray(np.asarray(image))
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420"), "jpg"
