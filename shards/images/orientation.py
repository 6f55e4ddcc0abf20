"""How a picture is to be turned, read from its metadata alone: no other tag is looked at, so none can be in the way.

What Pillow's `ImageOps.exif_transpose` makes of well-formed metadata is what counts: the EXIF tag, and XMP's where EXIF
has none. Unlike that, nothing here raises: cameras and editors write tags of types that no library expects.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TAG = 0x0112
"""The tag of EXIF and TIFF that says how a picture is to be turned."""

UPRIGHT = 1
"""The first of the values 1 to 8 that it has."""

SIDEWAYS, UPSIDE_DOWN, MIRRORED = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)
"""Those whose rows become columns, and those whose rows, or columns, are then put into the opposite order."""

_NUMBERS = {3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q"}
"""Types of a tag that are numbers, as `struct` spells them; two are a fraction."""

_TEXTS = (1, 2, 7)

_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


class Layout(NamedTuple):
    """How a TIFF directory is laid out: `struct` formats of its count, an entry (tag, type, count) and an offset."""

    num_entries: str
    entry: str
    offset: str

    @property
    def entry_bytes(self) -> int:
        """Bytes of a whole entry: its value, or where that is, follows."""
        return struct.calcsize(self.entry) + struct.calcsize(self.offset)


class Entry(NamedTuple):
    """An entry of a TIFF directory; `place` is where its value, or the offset of that, lies."""

    tag: int
    kind: int
    num_values: int
    place: int


def directory(block: bytes) -> tuple[Layout, int] | None:
    """The layout of the TIFF structure that a block is, and where its first directory begins; None if it is none."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(block[:2]))
    if order is None or len(block) < 16 or not {42, 43} & {*block[2:4]}:
        return None
    if 43 in block[2:4]:
        return Layout(order + "Q", order + "HHQ", order + "Q"), struct.unpack_from(order + "Q", block, 8)[0]
    return Layout(order + "H", order + "HHI", order + "I"), struct.unpack_from(order + "I", block, 4)[0]


def entries(block: bytes, layout: Layout, start: int) -> Iterator[Entry]:
    """Those of the directory at `start`, up to where it is cut."""
    first = start + struct.calcsize(layout.num_entries)
    if first > len(block):
        return
    [count] = struct.unpack_from(layout.num_entries, block, start)
    size = layout.entry_bytes
    for place in range(first, min(first + count * size, len(block) - size + 1), size):
        tag, kind, num_values = struct.unpack_from(layout.entry, block, place)
        yield Entry(tag, kind, num_values, place + struct.calcsize(layout.entry))


def number(block: bytes, layout: Layout, entry: Entry) -> float | None:
    """The first number of an entry, 0 where it holds text or bytes; None for unknown types and values that are cut."""
    form = _NUMBERS.get(entry.kind, "")
    size = struct.calcsize(layout.offset[0] + form) if form else 1
    if (not form and entry.kind not in _TEXTS) or entry.num_values < 1:
        return None
    place = entry.place
    if size * entry.num_values > struct.calcsize(layout.offset):
        [place] = struct.unpack_from(layout.offset, block, place)
    if place + size * entry.num_values > len(block):
        return None
    first, *divisor = struct.unpack_from(layout.offset[0] + form, block, place) if form else (0,)
    return first if not divisor else first / divisor[0] if divisor[0] else 0


def of_exif(block: bytes) -> int | None:
    """What an EXIF block says: 1 to 8, None if it has no such tag or is damaged before it."""
    while block.startswith(b"Exif\0\0"):
        block = block[6:]
    if (found := directory(block)) is None:
        return None
    layout, start = found
    values = [number(block, layout, entry) for entry in entries(block, layout, start) if entry.tag == TAG]
    said = [value for value in values if value is not None]
    return as_orientation(said[-1]) if said else None


def of_xmp(packet: bytes) -> int | None:
    """What an XMP packet says, likewise."""
    found = _XMP.search(packet)
    return as_orientation(int(found[1])) if found else None


def as_orientation(value: float) -> int:
    """1 to 8: upright for what is none of these."""
    return int(value) if value in range(1, 9) else UPRIGHT


def first_of(exif: list[bytes], xmp: bytes) -> int:
    """What the metadata of a file says in all.

    Args:
        exif: its EXIF blocks: those that follow the first go on with it, or stand for it where it is damaged.
        xmp: its XMP packet; empty for none.
    """
    said = [of_exif(b"".join([exif[0], *(part.removeprefix(b"Exif\0\0") for part in exif[1:])]))] if exif else []
    said += [of_exif(block) for block in exif[1:]] + [of_xmp(xmp)]
    return next((value for value in said if value is not None), UPRIGHT)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of pixels [H, W, ...] as they are to be seen."""
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in UPSIDE_DOWN else 1, :: -1 if orientation in MIRRORED else 1]
