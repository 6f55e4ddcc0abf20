"""Fashion-MNIST beyond the bundled images: what recipes are chosen by, and more test images than `make pretrain` has.

Needs Debian's package `dataset-fashion-mnist`, which the bundled images are from too (shards/sample/make_sample.py):
the first 10,000 training images, and test images 2,000 to 3,999.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.accuracies import ROOT
from shards.sample.make_sample import CLASSES, SOURCE, png, read_idx

OTHERS = ("others", "train", range(10_000, 30_000))
"""Training images that nothing is trained on; choices are made by them."""
TEST = ("test-8000", "t10k", range(2_000, 10_000))
"""All test images but the first 2,000, which an early recipe was chosen by; 2,000 of them are the bundled ones."""


def shards_of(part: tuple[str, str, range]) -> Path:
    """The shards of `OTHERS` or `TEST`, made if they are not there.

    Raises:
        SystemExit: if the package is not installed.
    """
    name, stem, numbers = part
    shards = ROOT / "data/shards" / f"fashion-mnist-{name}"
    if (shards / "manifest.json").is_file():
        return shards
    if not SOURCE.is_dir():
        raise SystemExit(f"{SOURCE}: not there; install Debian's package dataset-fashion-mnist")
    images, labels = read_idx(f"{stem}-images-idx3"), read_idx(f"{stem}-labels-idx1")
    archive = ROOT / "data" / f"fashion-mnist-{name}.zip"
    archive.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for number in numbers:
            file.writestr(f"{CLASSES[labels[number]]}/{number:05d}.png", png(images[number]))
    options = ["--labels", "folder", "--shuffle", "0", "--samples-per-shard", "1000", "--force"]
    subprocess.run([sys.executable, "-m", "shards", "convert", str(archive), str(shards), *options], check=True)
    archive.unlink()
    return shards
