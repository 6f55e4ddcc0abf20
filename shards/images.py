"""What can be told from an image's bytes without torch: format, size, whether it decodes."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from shards.manifest import IMAGE_FORMATS

_CODES = {name.upper(): code for code, name in enumerate(IMAGE_FORMATS)} | {"MPO": IMAGE_FORMATS.index("jpeg")}


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
    if not payload:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(payload)) as image:
            code = _CODES.get(image.format or "")
            if code is None:
                raise ImageError(f"format {image.format} is not supported")
            if decode:
                image.load()
            return ImageFacts(code, image.width, image.height)
    except UnidentifiedImageError as error:
        raise ImageError("not an image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, IndexError) as error:
        raise ImageError("damaged or cut image") from error
