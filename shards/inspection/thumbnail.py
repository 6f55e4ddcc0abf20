"""Small pictures for pages."""

from __future__ import annotations

import base64
import io

from PIL import Image

from shards.images.reading import ImageError, opened, to_rgb

_SIDE = 120
_SHOWN_PIXELS = 100_000_000
"""Larger images are not shown."""


def thumbnail(payload: bytes) -> str:
    """A small JPEG in base64; empty for what does not decode."""
    try:
        with opened(payload, max_pixels=_SHOWN_PIXELS, foreign=True) as image:
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            small = to_rgb(image)
    except ImageError:
        return ""
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    stored = io.BytesIO()
    small.save(stored, "JPEG", quality=80)
    return base64.b64encode(stored.getvalue()).decode()
