"""A pile of images that nobody sorted, made from the bundled ones: few frequent things, many near copies, much junk.

    python -m benchmarks.curated_pile data/fashion-mnist/train OUT --seed 0

Of a class, the first 600 images can be in the pile. In an order of classes that the seed draws, the class of rank r
gives 600 / r images (Zipf). In an order of all these that the seed draws, the image of rank i has 300 / i near copies
(Zipf again: a few images are everywhere): up to half a pixel is cut off each side, as 4 of 224 would be, and what is
left is encoded again as JPEG of quality 50 to 95.

Besides, 4,000 images of each kind of junk: of one grey, gradients, pages of text, and near copies of ten icons.
So one image in six shows a thing, and one in eleven one that is new; DINOv2's curation kept 142 of 1,200 million web
images (arXiv 2304.07193, section 3).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

OF_CLASS, COPIES, OF_JUNK, ICONS, SIDE = 600, 300, 4000, 10, 28
JUNK = ("grey", "gradient", "page", "icon")


def make_pile(source: Path, out: Path, seed: int) -> None:
    """Write the pile as one folder of images: CLASS-NUMBER, CLASS-NUMBER-copyN and JUNK-NUMBER."""
    out.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    classes = sorted(source.iterdir())
    real: list[tuple[str, Path]] = []
    for rank, place in enumerate(generator.permutation(len(classes)).tolist(), 1):
        files = sorted(classes[place].iterdir())[: OF_CLASS // rank]
        real += [(f"{classes[place].name}-{file.stem}", file) for file in files]
    for rank, place in enumerate(generator.permutation(len(real)).tolist(), 1):
        name, file = real[place]
        image = Image.open(file).convert("L")
        image.save(out / f"{name}.png")
        for number in range(COPIES // rank):
            near_copy(image, generator, out / f"{name}-copy{number}.jpg")
    icons = [icon(generator) for _ in range(ICONS)]
    for number in range(OF_JUNK):
        Image.fromarray(np.full((SIDE, SIDE), number % 256, np.uint8)).save(out / f"grey-{number:04d}.png")
        Image.fromarray(gradient(generator)).save(out / f"gradient-{number:04d}.png")
        Image.fromarray(text_page(generator)).save(out / f"page-{number:04d}.png")
        near_copy(Image.fromarray(icons[number % ICONS]), generator, out / f"icon-{number:04d}.jpg")


def near_copy(image: Image.Image, generator: np.random.Generator, path: Path) -> None:
    """Cut a little off an image, and encode it again."""
    left, top, right, bottom = generator.uniform(0, 0.5, 4)
    box = (left, top, image.width - right, image.height - bottom)
    part = image.resize(image.size, Image.Resampling.BICUBIC, box)
    part.save(path, quality=int(generator.integers(50, 95)))


def gradient(generator: np.random.Generator) -> np.ndarray:
    """From one grey to another in any direction, uint8 [28, 28]."""
    angle, (one, other) = generator.uniform(0, 2 * np.pi), generator.uniform(0, 255, 2)
    places = np.linspace(-0.5, 0.5, SIDE)
    ramp = 0.5 + (np.cos(angle) * places[None] + np.sin(angle) * places[:, None]) / np.sqrt(2)
    return (one + (other - one) * ramp).round().astype(np.uint8)


def text_page(generator: np.random.Generator) -> np.ndarray:
    """Lines of dark words of 1 to 5 pixels on white paper, uint8 [28, 28]."""
    page = np.full((SIDE, SIDE), 255, np.uint8)
    for line in range(2, SIDE - 3, 4):
        column = 2
        while column < SIDE - 2:
            length = int(generator.integers(1, 6))
            page[line : line + 2, column : min(column + length, SIDE - 2)] = generator.integers(0, 120)
            column += length + 1
    return page


def icon(generator: np.random.Generator) -> np.ndarray:
    """Few light blocks on grey, the left half as the right one, uint8 [28, 28]."""
    half = generator.random((7, 4)) < 0.5
    blocks = np.concatenate([half, half[:, 2::-1]], 1)
    return np.where(np.kron(blocks, np.ones((4, 4), bool)), 230, 128).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a folder per class")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_pile(options.source, options.out, options.seed)


if __name__ == "__main__":
    main()
