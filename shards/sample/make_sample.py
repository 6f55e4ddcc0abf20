"""Makes fashion-mnist.zip from Debian's package dataset-fashion-mnist:

    apt-get install dataset-fashion-mnist && python shards/sample/make_sample.py

The first 10,000 training images, and test images 2,000 to 3,999, as PNG files in class folders. The first 2,000 test
images are left out because the demo's recipe descends from one that was chosen by looking at them.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).with_name("fashion-mnist.zip")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
PARTS = {"train": ("train", range(10_000)), "test": ("t10k", range(2_000, 4_000))}


def read_idx(name: str) -> np.ndarray:
    """An array in IDX format: magic number with the number of dimensions, sizes, bytes."""
    content = gzip.decompress((SOURCE / f"{name}-ubyte.gz").read_bytes())
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)


def png(pixels: np.ndarray) -> bytes:
    """One image as small as PNG gets it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Write the archive; its bytes depend on the source and Pillow's compressor alone."""
    with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_STORED) as archive:
        for part, (stem, numbers) in PARTS.items():
            images, labels = read_idx(f"{stem}-images-idx3"), read_idx(f"{stem}-labels-idx1")
            for number in numbers:
                name = f"fashion-mnist/{part}/{CLASSES[labels[number]]}/{number:05d}.png"
                archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), png(images[number]))


if __name__ == "__main__":
    main()
