"""HEIC and AVIF photographs as phones write them: boxes beside the pixels turn them, whatever EXIF and XMP say."""

from __future__ import annotations

import base64
import io
import struct

import numpy as np
import pillow_heif
from PIL import Image

from shards.images.formats import can_read

TEN_BITS = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAAAAAAAAAOcG"
    "l0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAARgAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAABq"
    "aXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAAKAAAACAAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAGgAAAAB"
    "dpcG1hAAAAAAAAAAEAAQQBAoMEAAAATm1kYXQSAAoJOBUn+3gQEDSAMjcXgmMEwADyIIAQ3KkM67bRSKYKvpiUzWlbp63e+TPk2n/B8+5In74X"
    "a+9bZgrVN7jPG3KBSumz"
)
"""An AVIF of 10 bits of the zoo's picture, which Pillow does not write: libavif through imagecodecs 2026.3.6."""

_OPTIONS = {"HEIF": {"quality": 95, "chroma": 444}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}
_ORIENTATION, _ANOTHER = 0x0112, 0x0113


def _entry(tag: int, value: int) -> bytes:
    return struct.pack(">HHIHH", tag, 3, 1, value, 0)


def photograph(pixels: np.ndarray, form: str, *, boxes: int = 1, says: int = 0) -> bytes:
    """A photograph in a file of its own.

    Args:
        pixels: as stored, uint8 [H, W], [H, W, 3] or [H, W, 4].
        form: HEIF or AVIF.
        boxes: how its `irot` and `imir` turn it, 1 to 8.
        says: how its EXIF would, 1 to 8; 0 for one without EXIF.
    """
    exif = Image.Exif()
    exif[_ORIENTATION] = boxes  # of which both writers make boxes; only one leaves the tag there
    if says:
        exif[_ANOTHER] = says
    payload = _saved(pixels, form, exif=exif.tobytes())
    if not says:
        return payload
    there = _entry(_ORIENTATION, boxes) if form == "HEIF" else _entry(_ANOTHER, says)
    assert there in payload
    return payload.replace(there, _entry(_ORIENTATION, says))


def with_metadata(pixels: np.ndarray, form: str, *, exif: bytes = b"", xmp: bytes = b"") -> bytes:
    """One that its boxes do not turn, with metadata as they are, which must say an orientation."""
    hidden, plain = exif, xmp.replace(b"Orientation", b"orientatioN")
    for order in "<>":
        hidden = hidden.replace(struct.pack(f"{order}H", _ORIENTATION), struct.pack(f"{order}H", _ANOTHER))
    payload = _saved(pixels, form, **({"exif": hidden} if exif else {}), **({"xmp": plain} if xmp else {}))
    changed = payload.replace(plain, xmp) if xmp else payload.replace(hidden[6:], exif[6:])
    assert changed != payload
    return changed


def deep_heic(values: np.ndarray, bits: int) -> bytes:
    """Of 10 or 12 bits; values uint16 [H, W, 3]."""
    pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
    stored = io.BytesIO()
    size = values.shape[1], values.shape[0]
    pillow_heif.from_bytes(mode="RGB;16", size=size, data=values.tobytes()).save(stored, **_OPTIONS["HEIF"])
    pillow_heif.options.SAVE_HDR_TO_12_BIT = False
    return stored.getvalue()


def forms() -> list[tuple[str, str]]:
    """Pillow's names of the formats that can be read here, and ours."""
    return [(form, name) for form, name in (("HEIF", "HEIC"), ("AVIF", "AVIF")) if can_read(name)]


def _saved(pixels: np.ndarray, form: str, **options: object) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, form, **_OPTIONS[form], **options)
    return stored.getvalue()
