"""A frame as the planes of a JPEG: small, upright, in JPEG's colours. And a JPEG of such planes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from shards.clips.library import pyav

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Y [H, W], Cb and Cr [ceil(H / 2), ceil(W / 2)] as JPEG has them (BT.601, 0 to 255), uint8."""

_AS_JPEG = (2, 5, 6)
"""Matrices of colours that are JPEG's, or not stated (AVColorSpace)."""

_SHARES = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
"""Shares of red and blue in luma by matrix (AVColorSpace): BT.709, SMPTE 240M, BT.2020."""

_SHARES_OF_JPEG = (0.299, 0.114)
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG


class Shrinker:
    """Brings the frames of a video to a size, and to the planes of a JPEG."""

    def __init__(self) -> None:
        self._scale = pyav().video.reformatter
        # Each keeps the filters of one conversion; to make them takes longer than to use them.
        self._first, self._second = self._scale.VideoReformatter(), self._scale.VideoReformatter()
        self._fast = self._scale.Interpolation.AREA | self._scale.Interpolation.BITEXACT
        self._accurate = self._fast | self._scale.Interpolation.ACCURATE_RND  # the same from YUV to YUV, not to RGB

    def planes(self, frame: Any, width: int, height: int) -> Planes:
        """Planes of a frame, which is scaled to this size, and then turned as its display matrix says."""
        found = self._stored(frame, width, height)
        turns, is_mirrored = _display(frame)
        if not turns and not is_mirrored:
            return found
        upright = (np.rot90(plane, turns) for plane in found)
        first, second, third = (np.ascontiguousarray(plane[:, ::-1] if is_mirrored else plane) for plane in upright)
        return first, second, third

    def _stored(self, frame: Any, *size: int) -> Planes:
        if any(component.is_alpha for component in frame.format.components):
            return planes_of(_on_white(self._as_is(frame, size, "rgba", self._accurate).to_ndarray()))
        if frame.colorspace in _AS_JPEG:
            return _views(self._as_jpeg(self._first, frame, size, self._fast))
        small = self._as_is(frame, size, "yuv420p", self._fast)  # few pixels are faster to convert than many
        if shares := _SHARES.get(frame.colorspace):
            return as_jpeg_has_them(_views(small), shares, is_full=frame.color_range == _FULL_RANGE)
        return _views(self._as_jpeg(self._second, small, size, self._accurate))

    def _as_is(self, frame: Any, size: tuple[int, ...], form: str, quality: Any) -> Any:
        span = {"src_color_range": frame.color_range, "dst_color_range": frame.color_range}
        return self._first.reformat(frame, *size, form, **span, interpolation=quality, threads=1)

    def _as_jpeg(self, reformatter: Any, frame: Any, size: tuple[int, ...], quality: Any) -> Any:
        span = {"src_color_range": frame.color_range, "dst_color_range": self._scale.ColorRange.JPEG}
        matrix = self._scale.Colorspace.ITU601
        return reformatter.reformat(
            frame, *size, "yuvj420p", **span, dst_colorspace=matrix, interpolation=quality, threads=1
        )


def as_jpeg_has_them(planes: Planes, shares: tuple[float, float], *, is_full: bool) -> Planes:
    """Planes of another matrix of colours as those of a JPEG.

    Args:
        planes: Y [H, W], Cb and Cr [ceil(H / 2), ceil(W / 2)], uint8.
        shares: of red and blue in luma.
        is_full: whether they span 0 to 255; otherwise luma spans 16 to 235, and chroma 16 to 240.
    """
    low, luma_span, chroma_span = (0, 255, 255) if is_full else (16, 219, 224)
    change = _to_chroma(*_SHARES_OF_JPEG) @ np.linalg.inv(_to_chroma(*shares))
    blue, red = (plane.astype(np.float32) - 128 for plane in planes[1:])
    height, width = planes[0].shape

    def of_chroma(row: int, span: int) -> np.ndarray:
        of_blue, of_red = (np.float32(255 / span * part) for part in change[row, 1:])
        return of_blue * blue + of_red * red

    luma = (planes[0].astype(np.float32) - low) * np.float32(255 / luma_span)
    luma += of_chroma(0, chroma_span).repeat(2, 0).repeat(2, 1)[:height, :width]
    return _rounded(luma), _rounded(of_chroma(1, chroma_span) + 128), _rounded(of_chroma(2, chroma_span) + 128)


def _to_chroma(red: float, blue: float) -> np.ndarray:
    """From RGB to luma and chroma [3, 3], by the shares of red and blue in luma."""
    luma = np.array([red, 1 - red - blue, blue])
    of_blue, of_red = ((np.eye(3)[place] - luma) / (2 * (1 - luma[place])) for place in (2, 0))
    return np.stack([luma, of_blue, of_red])


def _rounded(plane: np.ndarray) -> np.ndarray:
    plane += 0.5
    return plane.clip(0, 255).astype(np.uint8)


def _views(frame: Any) -> Planes:
    first, second, third = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes
    )
    return first, second, third


def planes_of(pixels: np.ndarray) -> Planes:
    """Planes of RGB, uint8 [H, W, 3]."""
    luma, blue, red = Image.fromarray(pixels).convert("YCbCr").split()
    return np.asarray(luma), np.asarray(blue.reduce(2)), np.asarray(red.reduce(2))


def jpeg_of(planes: Planes, quality: int) -> bytes:
    """A JPEG. libjpeg reads as much luma as chroma covers: behind odd sides the last column and row are there once
    more, since what memory holds there differs from time to time.
    """
    luma, *chroma = planes
    height, width = luma.shape
    if height % 2 or width % 2:
        held = np.empty((height + height % 2, width + width % 2), np.uint8)
        held[:height, :width] = luma
        held[:height, width:] = luma[:, -1:]
        held[height:] = held[height - 1]
        luma = held[:height, :width]
    return bytes(simplejpeg.encode_jpeg_yuv_planes(luma, *chroma, quality))


def _display(frame: Any) -> tuple[int, bool]:
    """How a frame is to be shown: quarter turns counterclockwise, and whether it is mirrored horizontally after that.

    Source: the display matrix of FFmpeg, libavutil/display.h.
    """
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return 0, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(stored), np.int32).astype(np.float64).tolist()
    is_mirrored = a * d - b * c < 0
    if is_mirrored:
        a, c = -a, -c
    return round(-math.atan2(b, a) / (math.pi / 2)) % 4, is_mirrored


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] to [H, W, 3]: what is transparent is white."""
    image = Image.fromarray(pixels)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB"))
