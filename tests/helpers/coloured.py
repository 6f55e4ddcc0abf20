"""Coloured images whose colours their shapes decide."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw

from tests.helpers.commands import run_python

SIDE = 40


def coloured_shards(folder: Path, count: int, seed: int) -> Path:
    """Shards of red discs and blue squares of various lightness on grey, labelled: `folder`/shards."""
    draw = random.Random(seed)
    for number in range(count):
        disc = number % 2 == 0
        image = Image.new("RGB", (SIDE, SIDE), (200, 200, 200))
        left, top, size, bright = draw.randint(2, 18), draw.randint(2, 18), draw.randint(14, 20), draw.randint(-30, 30)
        box, colour = (left, top, left + size, top + size), (190, 60, 70) if disc else (70, 80, 190)
        shape = ImageDraw.Draw(image).ellipse if disc else ImageDraw.Draw(image).rectangle
        shape(box, fill=tuple(value + bright for value in colour))
        path = folder / "images" / ("disc" if disc else "square") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    shards = folder / "shards"
    options = ["--labels", "folder", "--shuffle", "0", "--samples-per-shard", "20", "--workers", "1"]
    run_python("-m", "shards", "convert", folder / "images", shards, *options)
    return shards
