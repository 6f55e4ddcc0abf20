"""COCO's ways to write an object's mask: polygons, and run lengths down the columns, as numbers or as text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_LONGEST_RUN = 2**31


def is_number(value: Any) -> bool:
    """Whether a value of JSON may be a place or an area in px."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9


def is_shape(value: Any) -> bool:
    """Whether a value of JSON may be a mask."""
    if isinstance(value, list):
        return all(
            isinstance(one, list) and len(one) >= 6 and len(one) % 2 == 0 and all(map(is_number, one)) for one in value
        )
    if not isinstance(value, dict) or not isinstance(value.get("size"), list) or len(value["size"]) != 2:
        return False
    counts = value.get("counts")
    return isinstance(counts, str) or (
        isinstance(counts, list) and all(type(one) is int and 0 <= one < _LONGEST_RUN for one in counts)
    )


def mask_of(shape: Any, height: int, width: int) -> np.ndarray:
    """Polygons or run lengths as a mask, uint8 [H, W].

    Raises:
        ValueError: run lengths that do not fill an image of this size.
    """
    if isinstance(shape, list):
        from pycocotools import mask as coco

        shape = coco.merge(coco.frPyObjects(shape, height, width))
        return _unrolled(runs_of(shape["counts"].decode()), height, width)
    if shape["size"] != [height, width]:
        raise ValueError(f"segmentation of {shape['size'][1]} x {shape['size'][0]} px, its image of {width} x {height}")
    counts = runs_of(shape["counts"]) if isinstance(shape["counts"], str) else shape["counts"]
    return _unrolled(counts, height, width)


def _unrolled(counts: list[int], height: int, width: int) -> np.ndarray:
    # pycocotools reads memory that nobody wrote where run lengths end early.
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"segmentation: its run lengths do not add up to the {height * width} px of the image")
    return np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8).reshape(width, height).T


def runs_of(text: str) -> list[int]:
    """Run lengths from COCO's text: digits of base 32 from 48 on, the lowest first, 32 more where another one follows;
    from the fourth on, what differs from the one before the last.

    Raises:
        ValueError: it ends within a number, or has other characters.
    """
    runs: list[int] = []
    value = place = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or place > 30:
            raise ValueError("segmentation: its run lengths are no text of COCO's")
        value |= (digit & 31) << place
        place += 5
        if digit & 32:
            continue
        value -= (digit >> 4 & 1) << place  # the highest bit is the sign
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = place = 0
    if place:
        raise ValueError("segmentation: its run lengths end within a number")
    return runs
