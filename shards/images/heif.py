"""HEIC and AVIF without their metadata: how they are turned is written beside the pixels, and is all that counts.

Both are boxes (ISO/IEC 14496-12, 23008-12): size, type, content. `meta` lists the items of a file, EXIF and XMP among
them; a library for these formats may fail at tags that it does not expect, or turn the picture by them once more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_METADATA = (b"Exif", b"mime", b"uri ")
_HIDDEN = b"free"
"""A type of items that no reader knows."""


def bare_heif(payload: bytes) -> bytes:
    """The same file, as long as it was, with its metadata hidden; as it is where its boxes make no sense."""
    changed = bytearray(payload)
    try:
        for place in _types_of_items(payload):
            if payload[place : place + 4] in _METADATA:
                changed[place : place + 4] = _HIDDEN
    except (struct.error, IndexError):
        return payload
    return bytes(changed)


def _types_of_items(payload: bytes) -> Iterator[int]:
    """Where the type of each item is."""
    for start, end in _boxes(payload, 0, len(payload), b"meta"):
        for first, last in _boxes(payload, start + 4, end, b"iinf"):
            count_bytes = 2 if payload[first] == 0 else 4
            for place, _ in _boxes(payload, first + 4 + count_bytes, last, b"infe"):
                version = payload[place]
                if version >= 2:
                    yield place + 4 + (2 if version == 2 else 4) + 2


def _boxes(payload: bytes, start: int, end: int, kind: bytes) -> Iterator[tuple[int, int]]:
    """Contents of the boxes of a kind that lie side by side from `start` on: where each begins and ends."""
    while start + 8 <= end:
        size, name = struct.unpack_from(">I4s", payload, start)
        header = 8
        if size == 1:
            [size], header = struct.unpack_from(">Q", payload, start + 8), 16
        size = size or end - start
        if size < header or start + size > end:
            return
        if name == kind:
            yield start + header, start + size
        start += size
