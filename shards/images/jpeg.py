"""What a JPEG says of itself before its pixels, read without a decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import simplejpeg

from shards.images.orientation import first_of

_SOS, _APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_DCT_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_XMP = b"http://ns.adobe.com/xap/1.0/\0"

_COLOUR_MARKS = {_APP0: (b"JFIF\0", 16), _APP2: (b"ICC_PROFILE\0", 16), _APP14: (b"Adobe", 14)}
"""Application segments that say what the numbers mean, by their beginning and least length; no other one does."""


@dataclass
class JpegHeader:
    """What comes before the first scan.

    Attributes:
        width, height: in pixels, as stored.
        components: 1 grey, 3 colour, 4 CMYK.
        is_ordinary: grey or colour of 8 bits that every decoder reads, at a reduced size as well.
        orientation: 1 to 8, how it is to be turned.
    """

    width: int = 0
    height: int = 0
    components: int = 0
    is_ordinary: bool = False
    orientation: int = 1
    _metadata: list[tuple[int, int]] = field(default_factory=list)

    def bare(self, payload: bytes | memoryview) -> bytes:
        """The same JPEG without its metadata, of which nothing changes a pixel."""
        parts, place = [], 0
        for start, end in self._metadata:
            parts.append(payload[place:start])
            place = end
        return b"".join([*parts, payload[place:]])


def read_header(payload: bytes | memoryview) -> JpegHeader | None:
    """The header of a JPEG; None for what is none, or has stray bytes or a cut before its first scan."""
    if bytes(payload[:2]) != b"\xff\xd8":
        return None
    header, xmp, place = JpegHeader(), b"", 2
    exif: list[bytes] = []
    while place + 4 <= len(payload) and payload[place] == 0xFF:
        marker = payload[place + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            place += 1 if marker == 0xFF else 2
            continue
        end = place + 2 + (payload[place + 2] << 8) + payload[place + 3]
        if marker == _SOS:
            header.orientation = first_of(exif, xmp)
            return header if header.width and header.height else None
        if end < place + 4 or end > len(payload):
            return None
        if marker in _FRAMES and end >= place + 10:
            _read_frame(header, marker, payload[place:end])
        elif marker == _APP1:
            block = bytes(payload[place + 4 : end])
            if block.startswith(b"Exif\0\0"):
                exif.append(block)
            elif block.startswith(_XMP):
                xmp = block[len(_XMP) :]
        if (_APP0 <= marker <= _APP15 or marker == _COMMENT) and not _says_colours(marker, payload[place + 4 : end]):
            header._metadata.append((place, end))
        place = end
    return None


def decode(
    payload: bytes | memoryview, header: JpegHeader, reduction: int = 1, buffer: np.ndarray | None = None
) -> np.ndarray:
    """Pixels of an ordinary JPEG as it is stored, uint8 [H, W, 3], sides divided by `reduction` and rounded up.

    Raises:
        ValueError: it is damaged, or only Pillow reads it, which forgives stray bytes.
    """
    shape = (-(-header.height // reduction), -(-header.width // reduction))
    try:
        pixels = simplejpeg.decode_jpeg(
            payload, colorspace="RGB", min_height=shape[0], min_width=shape[1], min_factor=reduction, buffer=buffer
        )
    except Exception as error:  # of subsamplings that it has no name for, KeyError
        raise ValueError(str(error)) from error
    if pixels.shape[:2] != shape:
        raise ValueError("has two sizes")
    return pixels


def _read_frame(header: JpegHeader, marker: int, segment: bytes | memoryview) -> None:
    header.height, header.width = (segment[5] << 8) + segment[6], (segment[7] << 8) + segment[8]
    header.components = segment[9]
    header.is_ordinary = marker in _DCT_FRAMES and segment[4] == 8 and header.components in (1, 3)


def _says_colours(marker: int, block: bytes | memoryview) -> bool:
    start, least = _COLOUR_MARKS.get(marker, (b"", 0))
    return bool(start) and bytes(block[: len(start)]) == start and len(block) + 2 >= least
