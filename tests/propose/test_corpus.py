"""What is said of images is what they are: made here with known sizes, colours, copies and damage."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from largescale.propose.corpus import look_at
from shards.cli import main as shards_main
from shards.ground.errors import InputError
from tests.helpers.conversions import write
from tests.helpers.images import encoded


def colours(width: int, height: int, seed: int, *, grey: bool = False) -> np.ndarray:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, 1 if grey else 3), np.uint8)
    return np.broadcast_to(pixels, (height, width, 3))


def shards_of(folder, files: dict[str, bytes]) -> str:
    write(folder / "images", files)
    options = ["--workers", "1", "--no-decode"]
    assert shards_main(["convert", str(folder / "images"), str(folder / "shards"), *options]) == 0
    return str(folder / "shards")


def test_colour_large_and_damaged_among_them(tmp_path):
    pixels = [colours(120, 90, seed) // np.array([1, 2, 4], np.uint8) for seed in range(9)]
    files = {f"{number}.png": encoded(Image.fromarray(image)) for number, image in enumerate(pixels)}
    wide = encoded(Image.fromarray(colours(300, 40, 99)))
    damaged = files["0.png"][: len(files["0.png"]) // 2]
    seen = look_at(shards_of(tmp_path, {**files, "damaged.png": damaged}))
    assert (seen.num_samples, seen.num_indexed, seen.num_decoded, seen.num_broken) == (10, 10, 9, 1)
    assert seen.num_classes == 0
    assert seen.shorter == (90, 90, 90) and seen.aspect[0] == pytest.approx(4 / 3)
    assert seen.grey == 0 and seen.copies == 0 and seen.flat < 0.01
    stacked = np.stack(pixels).reshape(-1, 3) / 255
    assert seen.mean == pytest.approx(stacked.mean(0)) and seen.std == pytest.approx(stacked.std(0))
    assert look_at(shards_of(tmp_path / "wide", {"wide.png": wide})).aspect == pytest.approx((7.5, 7.5))


def test_tiny_grey_and_copies(tmp_path):
    grey = [encoded(Image.fromarray(colours(8, 8, seed, grey=True)), "PNG") for seed in range(6)]
    seen = look_at(shards_of(tmp_path, {f"{number}.png": grey[number % 6] for number in range(8)}))
    assert seen.shorter == (8, 8, 8) and seen.grey == 1 and seen.copies == pytest.approx(0.25)
    assert seen.mean[0] == seen.mean[1] == seen.mean[2]


def test_a_photograph_is_no_drawing_because_it_is_large(tmp_path):
    flat = []
    for side in (128, 1024):
        photo = Image.fromarray(colours(32, 32, 0)).resize((side, side), Image.Resampling.BICUBIC)
        files = {"photo.png": encoded(photo, "PNG")}
        flat.append(look_at(shards_of(tmp_path / str(side), files)).flat)
    assert flat[1] == pytest.approx(flat[0], abs=0.02) and flat[0] < 0.1


def test_images_of_sixteen_bits_and_of_a_single_colour(tmp_path):
    deep = encoded(Image.fromarray(np.full((20, 30), 51 * 257, np.uint16)))
    seen = look_at(shards_of(tmp_path, {"deep.png": deep}))
    assert (
        seen.grey == seen.flat == 1
        and seen.mean == pytest.approx((0.2, 0.2, 0.2))
        and seen.std == pytest.approx((0, 0, 0))
    )


def test_nothing_to_look_at_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="missing: no such folder"):
        look_at(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"no manifest.json, so this is not a \(finished\) shard folder"):
        look_at(str(tmp_path / "empty"))
    half = encoded(Image.fromarray(colours(20, 20, 0)))[:200]
    with pytest.raises(InputError, match="none of 1 images can be decoded, such as half"):
        look_at(shards_of(tmp_path, {"half.png": half}))
