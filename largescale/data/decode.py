"""Image bytes to uint8 RGB."""

from __future__ import annotations

import io

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor

from largescale.data.reader import RawSample, SampleError


def decode(sample: RawSample, *, max_pixels: int) -> Tensor:
    """Decode once, to uint8 [3, H, W] (channels last in memory for JPEG), EXIF orientation applied.

    torchvision's decoders take the common formats; Pillow takes what they refuse.

    Raises:
        SampleError: more than `max_pixels` pixels, or bytes that no decoder accepts.
    """
    if sample.width * sample.height > max_pixels:
        raise SampleError(f"{sample.width} x {sample.height} pixels, more than data.max_pixels={max_pixels}")
    try:
        encoded = torch.frombuffer(bytearray(sample.payload), dtype=torch.uint8)
        return decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    except (RuntimeError, ValueError):
        return _decode_pillow(sample)


def _decode_pillow(sample: RawSample) -> Tensor:
    try:
        with Image.open(io.BytesIO(sample.payload)) as image:
            return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"cannot be decoded: {' '.join(str(error).split())[:200]}") from error
