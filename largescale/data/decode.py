"""Image bytes to uint8 RGB, at full size or reduced while decoding."""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from largescale.data.reader import RawSample, SampleError
from shards.images import ImageError, is_plain, opened, to_rgb

REDUCTIONS = (8, 4, 2)
"""Factors by which JPEG's inverse DCT can reduce an image for less than the price of decoding it whole."""

_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


class Scratch:
    """Memory that one thread decodes to, image after image: fresh memory costs a third of decoding."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def of(self, num_bytes: int) -> np.ndarray:
        """At least so many bytes."""
        if len(self._buffer) < num_bytes:
            self._buffer = np.empty(num_bytes * 5 // 4, np.uint8)
        return self._buffer


class EncodedImage:
    """An image whose size is known, not decoded yet.

    Attributes:
        height, width: in pixels, upright.
        reducible: whether it can be decoded at a reduced size.

    Raises:
        SampleError: more than `max_pixels` pixels, or bytes that are no image.
    """

    def __init__(self, sample: RawSample, *, max_pixels: int) -> None:
        if sample.width * sample.height > max_pixels:
            raise SampleError(f"{sample.width} x {sample.height} pixels, more than data.max_pixels={max_pixels}")
        self._payload, self._pixels = sample.payload, None
        self.reducible = _is_plain_jpeg(sample.payload)
        if self.reducible:
            self.height, self.width = sample.height, sample.width
        else:
            self._pixels = _decode_any(sample.payload, max_pixels)
            self.height, self.width = self._pixels.shape[:2]

    def decode(self, reduction: int = 1, scratch: Scratch | None = None) -> Tensor:
        """Decode, EXIF orientation applied.

        Args:
            reduction: 1, or for a reducible image one of REDUCTIONS: sides are divided by it and rounded up.
            scratch: memory for the result, which is then good until the next one is decoded to it.

        Returns:
            uint8 [3, H, W], channels last in memory.

        Raises:
            SampleError: the bytes cannot be decoded, or are not the size that the index says.
        """
        if self._pixels is None:
            shape = (-(-self.height // reduction), -(-self.width // reduction))
            buffer = scratch.of(3 * shape[0] * shape[1]) if scratch else None
            try:
                self._pixels = simplejpeg.decode_jpeg(
                    self._payload, colorspace="RGB", min_height=shape[0], min_width=shape[1], min_factor=reduction,
                    buffer=buffer,
                )
            except (ValueError, OSError):
                self._pixels = _decode_forgiving(self._payload, (self.height, self.width), shape)
            if self._pixels.shape[:2] != shape:
                found = "{} x {}".format(*self._pixels.shape[1::-1])
                raise SampleError(f"decodes to {found} pixels, the index says {self.width} x {self.height}")
        return torch.from_numpy(self._pixels).permute(2, 0, 1)


def decode(sample: RawSample, *, max_pixels: int) -> Tensor:
    """Decode at full size: uint8 [3, H, W]. Errors as of `EncodedImage`."""
    return EncodedImage(sample, max_pixels=max_pixels).decode()


def _decode_any(payload: memoryview, max_pixels: int) -> np.ndarray:
    """Whatever Pillow reads, upright, uint8 [H, W, 3]; JPEGs by the same decoder as all others where it can."""
    try:
        with opened(bytes(payload), max_pixels=max_pixels) as image:
            if image.format == "JPEG" and is_plain(image):
                try:
                    return simplejpeg.decode_jpeg(payload, colorspace="RGB")
                except ValueError:
                    pass  # Pillow may forgive what is wrong with it
            return np.array(to_rgb(image))
    except ImageError as error:
        raise _undecodable(error.__cause__ or error) from error


def _decode_forgiving(payload: memoryview, size: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """A JPEG of this size by Pillow, which forgives stray bytes between its parts, reduced to this shape."""
    pixels = _decode_any(payload, size[0] * size[1])
    if pixels.shape[:2] != size or size == shape:
        return pixels
    return np.array(Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BOX))


def _undecodable(error: BaseException) -> SampleError:
    return SampleError(f"cannot be decoded: {' '.join(str(error).split())[:200]}")


def _is_plain_jpeg(payload: memoryview) -> bool:
    """Whether this is a grey or colour JPEG without an EXIF block, read from its headers; no CMYK, nothing turned."""
    if bytes(payload[:2]) != b"\xff\xd8":
        return False
    place = 2
    while place + 9 < len(payload) and payload[place] == 0xFF:
        marker = payload[place + 1]
        if marker == 0xFF or marker in _WITHOUT_LENGTH:
            place += 1 if marker == 0xFF else 2
            continue
        if marker == 0xE1 and bytes(payload[place + 4 : place + 8]) == b"Exif":
            return False
        if marker in _FRAME_HEADERS:
            return payload[place + 9] in (1, 3)
        place += 2 + (payload[place + 2] << 8) + payload[place + 3]
    return False
