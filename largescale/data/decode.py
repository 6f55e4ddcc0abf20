"""Image bytes to uint8 RGB."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from largescale.data.reader import RawSample, SampleError

_ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned."""


def decode(sample: RawSample, *, max_pixels: int) -> Tensor:
    """Decode once, to uint8 [3, H, W] (channels last in memory), EXIF orientation applied.

    libjpeg-turbo takes upright RGB and grey JPEGs, Pillow the rest.

    Raises:
        SampleError: more than `max_pixels` pixels, or bytes that cannot be decoded.
    """
    if sample.width * sample.height > max_pixels:
        raise SampleError(f"{sample.width} x {sample.height} pixels, more than data.max_pixels={max_pixels}")
    try:
        with Image.open(io.BytesIO(sample.payload)) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            if plain and image.getexif().get(_ORIENTATION, 1) == 1:
                pixels = simplejpeg.decode_jpeg(sample.payload, colorspace="RGB")
            else:
                pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"cannot be decoded: {' '.join(str(error).split())[:200]}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
