"""Duplicates, exact and near, against a look at every pair."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from benchmarks.images import dead_leaves
from shards import duplicates
from shards.cli import main
from shards.convert import Options, convert
from shards.duplicates import Fingerprints, difference_hash, find_duplicates
from shards.ledger import read_ledger
from tests.shards.test_convert import contents, stored_images


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=quality)
    return stored.getvalue()


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures; of some a copy, a smaller one, one of lower quality, a brighter one."""
    folder = tmp_path_factory.mktemp("pile")
    for number in range(12):
        image = Image.fromarray(dead_leaves(160, 200, np.random.default_rng(number)))
        (folder / f"{number:02d}.jpg").write_bytes(jpeg(image))
        if number % 4 == 0:
            (folder / f"{number:02d}-copy.jpg").write_bytes(jpeg(image))
        if number % 4 == 1:
            (folder / f"{number:02d}-small.jpg").write_bytes(jpeg(image.resize((100, 80)), 70))
        if number % 4 == 2:
            (folder / f"{number:02d}-bright.jpg").write_bytes(jpeg(ImageEnhance.Brightness(image).enhance(1.1), 60))
    return folder


def test_equal_bytes_are_kept_once(pile, tmp_path):
    manifest = convert(pile, tmp_path / "out", Options("pile", samples_per_shard=4, shuffle=1, duplicates="exact"))
    rows = list(read_ledger(tmp_path / "out" / "skipped.parquet"))
    assert manifest.num_samples == 18 and manifest.skipped == {"a duplicate": 3}
    # The first of the listing is kept, and "-" comes before ".".
    assert {(row["source"], row["repeats"]) for row in rows} == {
        (f"{number:02d}.jpg", f"{number:02d}-copy.jpg") for number in (0, 4, 8)}


def test_pictures_that_look_alike_are_kept_once(pile, tmp_path):
    options = Options("pile", samples_per_shard=4, shuffle=1, duplicates="near", radius=6)
    manifest = convert(pile, tmp_path / "out", options)
    assert manifest.num_samples == 12
    assert manifest.skipped == {"a duplicate": 3, "a near duplicate": 6}
    assert {key[:2] for key in stored_images(tmp_path / "out")} == {f"{number:02d}" for number in range(12)}


def test_tasks_leave_out_duplicates_of_each_other(pile, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["--name", "pile", "--samples-per-shard", "4", "--shuffle", "1", "--duplicates", "near", "--workers", "1"]
    assert main(["convert", str(pile), str(whole), *command]) == 0
    for round_number in (1, 2):
        for task in range(3):
            assert main(["convert", str(pile), str(parts), *command, "--task", f"{task}/3"]) == 0
            if task < 2:
                assert main(["merge", str(parts)]) == 2
        assert main(["merge", str(parts)]) == 0
        assert ("duplicates are known now" in capsys.readouterr().out) == (round_number == 1)
    assert contents(parts) == contents(whole)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 300), radius=st.sampled_from([None, 0, 1, 3, 7]),
       per_file=st.sampled_from([7, 100, 10_000]))
def test_the_duplicates_are_those_of_a_look_at_every_pair(tmp_path_factory, seed, count, radius, per_file):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("scans")
    row = rng.permutation(5 * count)[:count].astype(np.uint64)
    low, high = rng.integers(0, max(1, count // 2), (2, count)).astype(np.uint64) << np.uint64(40)
    centre = rng.integers(0, 2**63, 10, np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (4, count)).astype(np.uint64), axis=0)
    look = centre[rng.integers(0, 10, count)] ^ np.where(rng.random(count) < 0.7, flips, np.uint64(0))
    scans = []
    for start in range(0, count, 50):
        part = slice(start, start + 50)
        scans.append(folder / f"{start}.safetensors")
        Fingerprints(row[part], low[part], high[part], look[part]).save(scans[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_ROWS_A_FILE", per_file)
        patch.setattr(duplicates, "_BLOCK", 16)
        found = find_duplicates(scans, folder / "work", radius)
    expected = []
    for i in range(count):
        same = (low == low[i]) & (high == high[i]) & (row < row[i])
        close = (np.bitwise_count(look ^ look[i]) <= (-1 if radius is None else radius)) & (row < row[i])
        if same.any():
            expected.append((row[i], row[same].min(), 0))
        elif close.any():
            expected.append((row[i], row[close].min(), 1))
    assert found.tolist() == sorted([int(value) for value in entry] for entry in expected)
    assert not (folder / "work").exists()


def test_the_difference_hash_survives_small_changes_and_tells_pictures_apart():
    images = [Image.fromarray(dead_leaves(200, 260, np.random.default_rng(number))) for number in range(20)]
    hashes = [difference_hash(jpeg(image)) for image in images]
    for image, own in zip(images, hashes, strict=True):
        brighter = ImageEnhance.Brightness(image).enhance(1.15)
        for changed in (image.resize((130, 100)), brighter, image.resize((500, 390))):
            assert (difference_hash(jpeg(changed, 70)) ^ own).bit_count() <= 6
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 10
