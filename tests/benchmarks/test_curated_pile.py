"""The pile of the benchmark of curation, and what its labels would choose of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import curated_pile
from benchmarks.curated import chosen_by_labels


@pytest.fixture
def source(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("bag", "coat", "shirt"):
        (tmp_path / "source" / name).mkdir(parents=True)
        for number in range(12):
            blocks = np.kron(generator.integers(0, 256, (4, 4)), np.ones((7, 7)))
            Image.fromarray(blocks.astype(np.uint8)).save(tmp_path / "source" / name / f"{number:02d}.png")
    return tmp_path / "source"


def pile(source: Path, out: Path, seed: int, monkeypatch) -> dict[str, bytes]:
    monkeypatch.setattr(curated_pile, "OF_CLASS", 12)
    monkeypatch.setattr(curated_pile, "OF_JUNK", 20)
    monkeypatch.setattr(curated_pile, "COPIES", 9)
    curated_pile.make_pile(source, out, seed)
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), float)


def test_sizes_fall_with_the_rank_of_a_class_and_copies_with_that_of_an_image(source, tmp_path, monkeypatch):
    found = pile(source, tmp_path / "out", 1, monkeypatch)
    keys = [Path(name).stem for name in found]
    own = [key for key in keys if "-copy" not in key]
    sizes = Counter(key.rpartition("-")[0] for key in own)
    copies = Counter(key.partition("-copy")[0] for key in keys if "-copy" in key)
    assert sorted(sizes.values()) == [4, 6, 12, 20, 20, 20, 20]
    assert sorted(copies.values()) == [1, 1, 1, 1, 1, 2, 3, 4, 9] and set(copies) <= set(own)
    assert len({key.rpartition("-")[0] for key in copies}) > 1, "of any class"
    assert pile(source, tmp_path / "again", 1, monkeypatch) == found
    assert set(pile(source, tmp_path / "other", 3, monkeypatch)) != set(found), "an order of its own"


def test_a_copy_is_nearer_to_its_image_than_any_other_is(source, tmp_path, monkeypatch):
    pile(source, tmp_path / "out", 1, monkeypatch)
    images = {path.stem: pixels(path) for path in (tmp_path / "out").glob("*.png")}
    for path in (tmp_path / "out").glob("*-copy?.jpg"):
        copy = pixels(path)
        nearest = min(images, key=lambda name: float(np.abs(images[name] - copy).mean()))
        assert nearest == path.stem.partition("-copy")[0]


def test_labels_choose_equally_many_images_of_each_class():
    keys = [f"bag-{number}.png" for number in range(9)] + [f"bag-{number}-copy0.jpg" for number in range(9)]
    keys += ["page-1.png", "coat-1.png", "coat-2.png", "icon-3.jpg", *(f"shirt-{number}.png" for number in range(5))]
    for target, sizes in ((12, [2, 5, 5]), (11, [2, 4, 4]), (99, [2, 5, 9]), (3, [1, 1, 1])):
        chosen = chosen_by_labels(keys, target)
        assert (np.diff(chosen) > 0).all() and not any("copy" in keys[one] for one in chosen)
        assert sorted(Counter(keys[one].partition("-")[0] for one in chosen).values()) == sizes
