"""Shards of coloured pictures with classes, for tasks that grey images have no colours for.

    apt-get install openclipart-png
    python -m benchmarks.coloured_pictures [/usr/share/openclipart/png]

Pictures count that have colours in at least `COLOURED` of their area, on white. A class is the first folder, if it says
what is shown and has `FEWEST` of them. Writes data/shards/coloured-pictures, a fifth of them to its folder holdout;
pictures that look like another are left out.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.accuracies import ROOT
from shards.cleaning.rules import Cleaning
from shards.conversion.convert import Options, convert

SHARDS = ROOT / "data" / "shards" / "coloured-pictures"
COLOURED, CHROMA, FEWEST, SIDE = 0.1, 40, 30, 80
"""Share of the area; difference between the largest and smallest of RGB from which on it counts; pictures of a class;
pixels of the longer side that is stored.
"""
NO_CLASS = {"special", "unsorted"}


def has_colours(path: Path) -> bool:
    """Whether a picture that can be read is coloured."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return False
    small.thumbnail((SIDE, SIDE))
    on_white = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB")
    pixels = np.asarray(on_white).astype(int)
    return bool((np.ptp(pixels, axis=2) > CHROMA).mean() >= COLOURED)


def labelled(folder: Path) -> Iterator[tuple[str, str]]:
    """Coloured pictures below a folder and their classes, those that are too few left out."""
    paths = [path for path in sorted(folder.rglob("*.png")) if has_colours(path)]
    classes = {path: path.relative_to(folder).parts[0] for path in paths}
    count = Counter(classes.values())
    for path, name in classes.items():
        if count[name] >= FEWEST and name not in NO_CLASS:
            yield str(path), name


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="?", default=Path("/usr/share/openclipart/png"))
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".csv", newline="") as table:
        csv.writer(table).writerows([("path", "class"), *labelled(arguments.pictures.resolve())])
        table.flush()
        options = Options(
            SHARDS.name,
            labels="column:class",
            shuffle=0,
            holdout=0.2,
            duplicates="near",
            cleaning=Cleaning(max_side=SIDE, plain=True),
        )
        convert(table.name, SHARDS, options)


if __name__ == "__main__":
    main()
