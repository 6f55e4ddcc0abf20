"""The first page of a TIFF alone: the tags that say how its pixels are stored, and none of the others, which may be of
any type and any size, or damaged, as may be the pages that follow.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import NamedTuple

import PIL

from shards.images.orientation import TAG, UPRIGHT, as_orientation, directory, entries, number

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES = 256, 257, 258, 259, 262, 277, 284
EXTRA_SAMPLES, SAMPLE_FORMAT, PROFILE = 338, 339, 34675
_OF_THE_PICTURE = frozenset(
    {
        WIDTH,
        HEIGHT,
        BITS,
        COMPRESSION,
        PHOTOMETRIC,
        SAMPLES,
        PLANES,
        EXTRA_SAMPLES,
        SAMPLE_FORMAT,
        266,
        273,
        278,
        279,
        292,
        293,
        317,
        320,
        322,
        323,
        324,
        325,
        347,
        529,
        530,
        531,
        532,
        PROFILE,
    }
)
"""In the second line: fill order, strips, fax options, predictor, palette, tiles, JPEG tables, YCbCr."""


def silence_libtiff() -> None:
    """Keep libtiff from writing to the terminal what is wrong with a file that it does not name; Pillow raises as well.

    Where Pillow's libtiff is not the one in its wheel, it goes on to write.
    """
    for path in (Path(PIL.__file__).parent.parent / "pillow.libs").glob("libtiff*.so*"):
        try:
            ctypes.CDLL(str(path)).TIFFSetErrorHandler(None)
        except (OSError, AttributeError):
            return


class Page(NamedTuple):
    """The first page of a TIFF.

    Attributes:
        payload: a TIFF that has no other page, and no tags but those that pixels depend on.
        orientation: 1 to 8.
        has_more: whether other pages follow.
        numbers: tags whose first value is a number, with that.
    """

    payload: bytes
    orientation: int
    has_more: bool
    numbers: dict[int, float]


def bare_tiff(payload: bytes) -> Page | None:
    """The first page of a TIFF alone; None for what is none, or has no whole directory."""
    found = directory(payload)
    if found is None:
        return None
    layout, start = found
    first = start + struct.calcsize(layout.num_entries)
    if first > len(payload):
        return None
    [count] = struct.unpack_from(layout.num_entries, payload, start)
    all_entries = list(entries(payload, layout, start))
    end = first + count * layout.entry_bytes
    if len(all_entries) < count:
        return None
    next_page = payload[end : end + struct.calcsize(layout.offset)]
    size = layout.entry_bytes
    kept = sorted(
        {
            entry.tag: entry
            for entry in all_entries
            if entry.tag in _OF_THE_PICTURE and (entry.tag != PROFILE or entry.kind in (1, 7))
        }.values()
    )
    raw = [payload[entry.place - struct.calcsize(layout.entry) :][:size] for entry in kept]
    offset = len(payload) + len(payload) % 2
    is_big = layout.offset.endswith("Q")
    header = payload[: 8 if is_big else 4] + struct.pack(layout.offset, offset)
    body = payload[len(header) :] + bytes(len(payload) % 2)
    page = struct.pack(layout.num_entries, len(raw)) + b"".join(raw) + bytes(struct.calcsize(layout.offset))
    values = {
        entry.tag: value
        for entry in all_entries
        if entry.tag in (*_OF_THE_PICTURE, TAG) and (value := number(payload, layout, entry)) is not None
    }
    return Page(header + body + page, as_orientation(values.get(TAG, UPRIGHT)), any(next_page), values)
