"""Image bytes to uint8 RGB, at full size or reduced while decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from largescale.data.reader import RawSample, SampleError
from shards.ground.errors import InputError
from shards.images.jpeg import read_header
from shards.images.orientation import SIDEWAYS, UPRIGHT, turned
from shards.images.reading import ImageError, read_jpeg, read_rgb

REDUCTIONS = (8, 4, 2)
"""Factors by which JPEG's inverse DCT can reduce an image for less than the price of decoding it whole."""


class Scratch:
    """Memory that one thread decodes to, image after image: fresh memory costs a third of decoding."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def of(self, num_bytes: int) -> np.ndarray:
        """At least `num_bytes` of memory."""
        if len(self._buffer) < num_bytes:
            self._buffer = np.empty(num_bytes * 5 // 4, np.uint8)
        return self._buffer


class EncodedImage:
    """An image whose size is known, not decoded yet.

    Attributes:
        height, width: in pixels, upright.
        stored: height and width as it is stored.
        reducible: whether it can be decoded at a reduced size.
        orientation: how it is to be turned, 1 to 8, as EXIF counts.

    Raises:
        SampleError: more than `max_pixels` pixels, or bytes that are no image.
        MemoryError: there is too little for it.
    """

    def __init__(self, sample: RawSample, *, max_pixels: int) -> None:
        if sample.width * sample.height > max_pixels:
            raise SampleError(f"{sample.width} x {sample.height} pixels, more than data.max_pixels={max_pixels}")
        self._payload, self._pixels, self.orientation = sample.payload, None, UPRIGHT
        header = read_header(sample.payload)
        self._header = header if header and header.is_ordinary else None
        self.reducible = self._header is not None
        if self._header:
            self.stored = self._header.height, self._header.width
            self.orientation = self._header.orientation
        else:
            self._pixels = _read(sample.payload, max_pixels)
            self.stored = self._pixels.shape[:2]
        if sorted(self.stored) != sorted((sample.height, sample.width)):
            raise SampleError(
                f"decodes to {self.stored[1]} x {self.stored[0]} pixels, the index says "
                f"{sample.width} x {sample.height}"
            )
        self.height, self.width = self.stored[::-1] if self.orientation in SIDEWAYS else self.stored

    def decode(self, reduction: int = 1, scratch: Scratch | None = None) -> Tensor:
        """Decode.

        Args:
            reduction: 1, or for a reducible image one of REDUCTIONS: sides are divided by it and rounded up.
            scratch: memory for the result, which is then good until the next one is decoded to it.

        Returns:
            uint8 [3, H, W], channels last in memory: upright at full size; as it is stored where it is reduced, since a
            few crops are turned faster than the whole.

        Raises:
            SampleError: the bytes cannot be decoded.
        """
        if self._pixels is None:
            assert self._header is not None, "what has no header was decoded at once"
            num_bytes = 3 * -(-self.stored[0] // reduction) * -(-self.stored[1] // reduction)
            with _training_errors():
                pixels = read_jpeg(self._payload, self._header, reduction, scratch.of(num_bytes) if scratch else None)
            self._pixels = pixels if reduction > 1 else np.ascontiguousarray(turned(pixels, self.orientation))
        return torch.from_numpy(self._pixels).permute(2, 0, 1)


def decode(sample: RawSample, *, max_pixels: int) -> Tensor:
    """Decode at full size, upright: uint8 [3, H, W]. Errors as of `EncodedImage`."""
    return EncodedImage(sample, max_pixels=max_pixels).decode()


def _read(payload: bytes, max_pixels: int) -> np.ndarray:
    with _training_errors():
        return read_rgb(payload, max_pixels=max_pixels)


@contextmanager
def _training_errors() -> Iterator[None]:
    """Errors of reading an image as those of a sample; the remedies of a conversion are not those of a training."""
    try:
        yield
    except ImageError as error:
        why = error.__cause__ or error
        raise SampleError(f"cannot be decoded: {' '.join(str(why).split())[:200]}") from error
    except InputError as error:
        raise MemoryError(str(error).partition(":")[0]) from error
