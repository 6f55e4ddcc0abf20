"""Scenes of several Fashion-MNIST images whose labels, masks and boxes are known, for protocols beyond one class each.

    python -m benchmarks.canvases OUT [--train 4000] [--test 1000] [--seed 0]

writes two shard folders, OUT/train and OUT/test, of images that share no garment. A scene is 64 x 64 px, grey, with a
noisy background, and has one to four garments in a jittered grid of two by two. Each sample has

    KEY.png         the scene
    KEY.json        labels: names of the classes in it; annotations: its garments as COCO has objects, with masks as run
                    lengths; category_id is the number of the class in `CLASSES`
    KEY.mask.png    grey: 0 where there is none, else 1 + the number of the class
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import shards

SAMPLE = Path(shards.__file__).parent / "sample" / "fashion-mnist.zip"
CLASSES = ("ankle-boot", "bag", "coat", "dress", "pullover", "sandal", "shirt", "sneaker", "t-shirt", "trouser")
SIDE, _CELL = 64, 32
_FOREGROUND = 24
"""Grey value from which a pixel belongs to a garment."""
_PER_SHARD = 1000


def garments(part: str, most: int) -> list[tuple[np.ndarray, int]]:
    """Images [28, 28] uint8 of `train` or `test` with the numbers of their classes, equally many of each class."""
    found: list[tuple[np.ndarray, int]] = []
    taken = dict.fromkeys(CLASSES, 0)
    with zipfile.ZipFile(SAMPLE) as archive:
        for name in sorted(archive.namelist()):
            pieces = name.split("/")
            if name.endswith(".png") and pieces[1] == part and taken[pieces[2]] < most:
                taken[pieces[2]] += 1
                pixels = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("L"))
                found.append((pixels, CLASSES.index(pieces[2])))
    return found


def scenes(
    part: str, num: int, seed: int, most: int = 1000
) -> Iterator[tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """Scene and mask, uint8 [SIDE, SIDE], and annotations."""
    random, known = np.random.default_rng([seed, part == "test"]), garments(part, most)
    for _ in range(num):
        scene = random.integers(0, _FOREGROUND, (SIDE, SIDE)).astype(np.uint8)
        mask, annotations = np.zeros((SIDE, SIDE), np.uint8), []
        for cell in random.permutation(4)[: random.integers(1, 5)]:
            pixels, number = known[random.integers(len(known))]
            top, left = (int(_CELL * place + random.integers(0, _CELL - 28 + 1)) for place in divmod(int(cell), 2))
            inside = np.zeros((SIDE, SIDE), bool)
            inside[top : top + 28, left : left + 28] = pixels >= _FOREGROUND
            scene[inside] = pixels[pixels >= _FOREGROUND]
            mask[inside] = number + 1
            annotations.append({"category_id": number, **annotated(inside)})
        yield scene, mask, annotations


def annotated(inside: np.ndarray) -> dict[str, Any]:
    """Box, area and run lengths of a mask, bool [H, W], as COCO has them."""
    rows, columns = (np.nonzero(inside.any(axis))[0] for axis in (1, 0))
    downwards = inside.T.flatten()
    turns = np.flatnonzero(np.diff(downwards, prepend=False)).tolist()
    return {
        "bbox": [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)],
        "area": int(inside.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(inside.shape), "counts": np.diff([0, *turns, inside.size]).tolist()},
    }


def write(out: Path, part: str, num: int, seed: int, most: int = 1000) -> Path:
    """Write scenes as a shard folder, and index it."""
    folder = out / part
    folder.mkdir(parents=True)
    made = scenes(part, num, seed, most)
    for shard in range(-(-num // _PER_SHARD)):
        with tarfile.open(folder / f"{part}-{shard:06d}.tar", "w") as tar:
            for number in range(shard * _PER_SHARD, min(num, (shard + 1) * _PER_SHARD)):
                scene, mask, annotations = next(made)
                labels = sorted({CLASSES[one["category_id"]] for one in annotations})
                about = {"labels": labels, "annotations": annotations}
                for suffix, payload in (
                    ("json", json.dumps(about).encode()),
                    ("mask.png", _png(mask)),
                    ("png", _png(scene)),
                ):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
    shards.index(folder, workers=1)
    return folder


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    """Write scenes to train and to test on, with their labels, as shards under OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--train", type=int, default=4000, metavar="N", help="scenes to train on")
    parser.add_argument("--test", type=int, default=1000, metavar="N", help="scenes to test on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for part, num in (("train", arguments.train), ("test", arguments.test)):
        print(write(arguments.out, part, num, arguments.seed))


if __name__ == "__main__":
    main()
