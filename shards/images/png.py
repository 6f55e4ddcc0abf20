"""A PNG without what is not its first picture: texts, EXIF, dates, further frames. Any of them may be damaged, or
larger than a library takes, and the picture whole.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from shards.images.orientation import first_of

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_OF_THE_PICTURE = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP"})
_MAX_TEXT = 2**22
"""Bytes of a compressed text that are looked at; an orientation stands further in front."""


def bare_png(payload: bytes) -> tuple[bytes, int, bool]:
    """A PNG's first picture alone.

    Returns:
        Its bytes, the orientation that the metadata name, and whether there are further frames.
    """
    parts, start, exif, profile, xmp, has_more = [], 0, b"", b"", b"", False
    for kind, begin, end in _chunks(payload):
        if kind not in _OF_THE_PICTURE or (kind == b"iCCP" and not _is_whole(payload, begin, end)):
            parts.append(payload[start:begin])
            start = end
        body = begin + 8, end - 4
        if kind == b"eXIf":
            exif = payload[slice(*body)]
        elif kind == b"acTL":
            has_more = payload[body[0] : body[0] + 4] > b"\0\0\0\1"
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, _, text = payload[slice(*body)].partition(b"\0")
            if name == b"XML:com.adobe.xmp":
                xmp = _text(kind, text)
            elif name == b"Raw profile type exif":
                profile = _raw_profile(_text(kind, text))
    parts.append(payload[start:])
    blocks = [block for block in (exif or profile,) if block]
    return b"".join(parts), first_of(blocks, xmp), has_more


def _chunks(payload: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of each whole chunk."""
    place = len(SIGNATURE)
    while place + 12 <= len(payload):
        size, kind = struct.unpack_from(">I4s", payload, place)
        if place + 12 + size > len(payload) or not kind.isalpha():
            return
        yield kind, place, place + 12 + size
        place += 12 + size


def _is_whole(payload: bytes, begin: int, end: int) -> bool:
    """Whether a colour profile unpacks, and its checksum is right: else the picture has none."""
    if zlib.crc32(payload[begin + 4 : end - 4]) != struct.unpack_from(">I", payload, end - 4)[0]:
        return False
    try:
        packed = payload[begin + 8 : end - 4].partition(b"\0")[2]
        return 0 < len(_unpacked(packed[1:], 2**20)) < 2**20
    except zlib.error:
        return False


def _text(kind: bytes, text: bytes) -> bytes:
    if kind == b"tEXt":
        return text
    packed = text[:1] == b"\0" if kind == b"zTXt" else text[:1] == b"\1"
    if kind == b"iTXt":  # after two bytes come a language and the keyword in it
        text = b"\0" + text[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return _unpacked(text[1:], _MAX_TEXT) if packed else text[1:]
    except zlib.error:
        return b""


def _unpacked(packed: bytes, limit: int) -> bytes:
    return zlib.decompressobj().decompress(packed, limit)


def _raw_profile(text: bytes) -> bytes:
    """EXIF as ImageMagick writes it: a name and a length, then lines of hexadecimal digits."""
    digits = b"".join(text.split(b"\n")[3:])
    return bytes.fromhex(digits.decode()) if re.fullmatch(rb"(?:[0-9a-fA-F]{2})*", digits) else b""
