"""What happens to an image before it is stored: left out for a reason, kept as is, or re-encoded plain and small."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from shards.ground.errors import InputError
from shards.images.formats import needs
from shards.images.names import IMAGE_FORMATS, STORED_SUFFIXES
from shards.images.reading import (
    MAX_PIXELS,
    ImageError,
    ImageFacts,
    facts,
    from_profile,
    inspect,
    is_animated,
    is_plain,
    jpeg_facts,
    opened,
    orientation_of,
    profile_of,
    upright,
    upright_of,
)

_JPEG_SIDE = 65_535
"""The most pixels a side of a JPEG can have."""

_THUMBNAIL = 32
_FLAT_RANGE = 4
"""Range of grey values that a single-colour image may span after JPEG compression."""


@dataclass(frozen=True)
class Cleaning:
    """Which images are kept, and how. Zero or False leaves a rule out.

    Attributes:
        min_side: pixels of the shorter side below which an image is left out.
        max_pixels: pixels above which it is left out, before it is decoded (decompression bombs).
        max_aspect: longer / shorter side above which it is left out.
        blank: leave out images of a single colour.
        animated: leave out images with several frames; otherwise their first frame counts.
        max_side: larger images are shrunk until their longer side has this many pixels.
        quality: of the JPEGs written then.
        plain: store what is not plain (rotated by EXIF, CMYK, 16 bits, palette, transparent, animated) as plain RGB.
        srgb: also re-encode images with a colour profile. Whatever is re-encoded is sRGB, without a profile.
        decode: decode images that keep their bytes, to find damage.

    Raises:
        InputError: a value that makes no sense.
    """

    min_side: int = 0
    max_pixels: int = MAX_PIXELS
    max_aspect: float = 0.0
    blank: bool = False
    animated: bool = False
    max_side: int = 0
    quality: int = 90
    plain: bool = False
    srgb: bool = False
    decode: bool = True

    def __post_init__(self) -> None:
        for key, most in (("min_side", math.inf), ("max_pixels", math.inf), ("max_side", _JPEG_SIDE)):
            if not 0 <= getattr(self, key) <= most:
                limit = "0 or more" if most == math.inf else f"0 to {most}"
                raise InputError(f"--{key.replace('_', '-')}={getattr(self, key)}: expected {limit}; 0 is no limit")
        if self.max_aspect != 0 and not 1 <= self.max_aspect < math.inf:
            raise InputError(f"--max-aspect={self.max_aspect}: expected 1 or more; 0 is no limit")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality={self.quality}: expected 1 to 100")

    @property
    def may_store_anew(self) -> bool:
        """Whether any image may be re-encoded, which formats that shards cannot hold need."""
        return bool(self.plain or self.max_side or self.srgb)

    def apply(self, payload: bytes, suffix: str) -> tuple[bytes, str, ImageFacts]:
        """Clean one image.

        Args:
            payload: its bytes.
            suffix: of its file.

        Returns:
            The bytes to store and their suffix (unchanged if nothing applies), and the facts in their header.

        Raises:
            ImageError: it is left out; the message is the reason.
        """
        if self._keeps_jpegs() and (header := jpeg_facts(payload)):
            self.check_size(header.width, header.height)
            if self.decode:
                inspect(payload, decode=True, max_pixels=0)
            return payload, _stored_suffix(suffix, header), header
        with opened(payload, max_pixels=self.max_pixels, foreign=self.may_store_anew) as image:
            self._check_header(image)
            header, large = facts(image), self._is_large(image)
            pixels = self._pixels(payload, image)
            if pixels is not None:
                lossless = IMAGE_FORMATS[header.format] in ("png", "bmp", "tiff", "gif", "ppm") and not large
                stored, suffix = _encode(pixels, self.quality, lossless=lossless)
                return stored, suffix, ImageFacts(IMAGE_FORMATS.index("png" if lossless else "jpeg"), *pixels.size)
            if self.decode:
                upright_of(payload, image)
        return payload, _stored_suffix(suffix, header), header

    def check(self, payload: bytes, image: Image.Image) -> None:
        """Raise if `apply` would leave an image out, except for damage that only decoding shows.

        Args:
            payload: its bytes.
            image: the same, opened.

        Raises:
            ImageError: it is left out; the message is the reason.
        """
        self._check_header(image)
        if self.blank:
            self._pixels(payload, image)

    def check_size(self, width: int, height: int) -> None:
        """Raise ImageError if images of this size, in pixels, are left out."""
        if self.max_pixels and width * height > self.max_pixels:
            raise ImageError("too many pixels")
        if min(width, height) < self.min_side:
            raise ImageError("too small")
        if self.max_aspect and max(width, height) > self.max_aspect * min(width, height):
            raise ImageError("extreme aspect ratio")

    def _check_header(self, image: Image.Image) -> None:
        self.check_size(*image.size)
        if self.animated and is_animated(image):
            raise ImageError("animated")
        if image.format in ("AVIF", "HEIF") and not self._is_stored_anew(image):
            raise ImageError(needs("AVIF" if image.format == "AVIF" else "HEIC"))

    def _keeps_jpegs(self) -> bool:
        return not (self.blank or self.may_store_anew)

    def _is_stored_anew(self, image: Image.Image) -> bool:
        return bool(self._is_large(image) or (self.srgb and profile_of(image)) or (self.plain and not is_plain(image)))

    def _is_large(self, image: Image.Image) -> bool:
        return self.max_side > 0 and max(image.size) > self.max_side

    def _pixels(self, payload: bytes, image: Image.Image) -> Image.Image | None:
        """The RGB image to encode; None for an image that keeps its bytes. ImageError: it is blank."""
        profile, anew = profile_of(image), self._is_stored_anew(image)
        pixels: Image.Image | None = None
        may_shrink = image.format == "JPEG" and image.mode in ("L", "RGB") and not (profile and image.mode == "L")
        if self._is_large(image) and may_shrink:
            pixels = self._decoded_small(payload, image)
        if pixels is None and (anew or self.blank):
            pixels = self._reduced(upright_of(payload, image, srgb=anew))
        if self.blank and pixels is not None and is_blank(pixels):
            raise ImageError("a single colour")
        return pixels if anew else None

    def _decoded_small(self, payload: bytes, image: Image.Image) -> Image.Image | None:
        """An ordinary JPEG, reduced while decoding; None if only Pillow can read it, which tolerates stray bytes."""
        width, height = self._reduced_size(image.size)
        try:
            decoded = simplejpeg.decode_jpeg(payload, colorspace="RGB", min_height=height, min_width=width)
        except Exception:  # KeyError for subsamplings it has no name for
            return None
        pixels = upright(self._reduced(Image.fromarray(decoded), image.size), orientation_of(image))
        profile = profile_of(image)
        return from_profile(pixels, profile).convert("RGB") if profile else pixels

    def _reduced(self, pixels: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
        """Shrink to `max_side`, averaging over areas; `size` is the whole image's if `pixels` are reduced already."""
        reduced = self._reduced_size(size or pixels.size)
        return pixels if pixels.size == reduced else pixels.resize(reduced, Image.Resampling.BOX)

    def _reduced_size(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = min(1.0, self.max_side / max(size)) if self.max_side else 1.0
        width, height = (max(1, round(side * scale)) for side in size)
        return width, height


def is_blank(image: Image.Image) -> bool:
    """Whether an RGB image has a single colour."""
    small = np.asarray(image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)).astype(int)
    return int((small.max((0, 1)) - small.min((0, 1))).max()) <= _FLAT_RANGE


def _stored_suffix(suffix: str, header: ImageFacts) -> str:
    """The suffix to store under: readers of shards go by it, so it must be one they know."""
    name = IMAGE_FORMATS[header.format]
    return suffix if suffix in STORED_SUFFIXES else "jpg" if name == "jpeg" else name


def _encode(image: Image.Image, quality: int, *, lossless: bool) -> tuple[bytes, str]:
    if lossless:
        stored = io.BytesIO()
        image.save(stored, "PNG", icc_profile=None)
        return stored.getvalue(), "png"
    pixels = np.ascontiguousarray(np.asarray(image))
    return simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420"), "jpg"
