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
from shards.cleaning import duplicates
from shards.cleaning.duplicates import Fingerprints, difference_hash, find_duplicates, image_hashes
from shards.cleaning.rules import Cleaning
from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.images.reading import ImageError
from tests.helpers.conversions import contents, stored_images


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
        (f"{number:02d}.jpg", f"{number:02d}-copy.jpg") for number in (0, 4, 8)
    }


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
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 300),
    radius=st.sampled_from([None, 0, 1, 3, 7]),
    per_file=st.sampled_from([7, 100, 10_000]),
)
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
        found = [entry for block in find_duplicates(scans, folder / "work", radius) for entry in block.tolist()]
    expected = []
    for i in range(count):
        same = (low == low[i]) & (high == high[i]) & (row < row[i])
        close = (np.bitwise_count(look ^ look[i]) <= (-1 if radius is None else radius)) & (row < row[i])
        if same.any():
            expected.append((row[i], row[same].min(), 0))
        elif close.any():
            expected.append((row[i], row[close].min(), 1))
    assert found == sorted([int(value) for value in entry] for entry in expected)
    assert not (folder / "work").exists()


def test_the_difference_hash_survives_small_changes_and_tells_pictures_apart():
    images = [Image.fromarray(dead_leaves(200, 260, np.random.default_rng(number))) for number in range(20)]
    hashes = [difference_hash(jpeg(image), Cleaning()) for image in images]
    for image, own in zip(images, hashes, strict=True):
        brighter = ImageEnhance.Brightness(image).enhance(1.15)
        for changed in (image.resize((130, 100)), brighter, image.resize((500, 390))):
            assert (difference_hash(jpeg(changed, 70), Cleaning()) ^ own).bit_count() <= 6
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 10


def pictures_of(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    return [np.asarray(Image.fromarray(dead_leaves(160, 200, rng)).convert("L")) for _ in range(count)]


def test_what_the_rules_leave_out_is_no_original(tmp_path):
    picture = Image.fromarray(dead_leaves(600, 800, np.random.default_rng(0)))
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a_thumb.jpg").write_bytes(jpeg(picture.resize((80, 60))))
    (tmp_path / "pile" / "cut.jpg").write_bytes(jpeg(picture)[:-900])
    (tmp_path / "pile" / "photo.jpg").write_bytes(jpeg(picture))
    options = Options("pile", duplicates="near", radius=7, cleaning=Cleaning(min_side=100))
    manifest = convert(tmp_path / "pile", tmp_path / "out", options)
    assert manifest.num_samples == 1
    assert manifest.skipped == {"too small": 1, "damaged or cut image": 1}


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (Cleaning(max_pixels=100), "too many pixels"),
        (Cleaning(max_aspect=1.1), "extreme aspect ratio"),
        (Cleaning(blank=True), "a single colour"),
    ],
)
def test_the_scan_knows_the_rules(rules, reason):
    payload = jpeg(Image.new("RGB", (40, 30), (3, 3, 3)))
    with pytest.raises(ImageError, match=reason):
        difference_hash(payload, rules)
    assert image_hashes(payload, rules, look=True) is None
    assert image_hashes(payload, rules, look=False) is not None  # its copies are left out by the same rule


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    payload = jpeg(Image.new("RGB", (400, 300)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="too many pixels"):
        difference_hash(payload, Cleaning(max_pixels=100))


@pytest.mark.parametrize("top", [65535, 4095])
def test_pictures_of_16_bits_look_as_those_of_8_bits(top):
    pictures = pictures_of(np.random.default_rng(3), 8)
    hashes = []
    for grey in pictures:
        deep, stored = Image.fromarray((grey.astype(np.uint32) * top // 255).astype(np.uint16)), io.BytesIO()
        deep.save(stored, "PNG")
        hashes.append(difference_hash(stored.getvalue(), Cleaning()))
        assert (hashes[-1] ^ difference_hash(jpeg(Image.fromarray(grey)), Cleaning())).bit_count() <= 6
    assert min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]) > 10


def test_a_picture_is_hashed_as_it_is_seen():
    picture = Image.fromarray(dead_leaves(160, 200, np.random.default_rng(5)))
    expected = difference_hash(jpeg(picture), Cleaning())
    exif, turned = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(turned, "JPEG", exif=exif)
    assert (difference_hash(turned.getvalue(), Cleaning()) ^ expected).bit_count() <= 4
    mask = Image.fromarray(np.where(np.asarray(picture.convert("L")) > 110, 255, 0).astype(np.uint8))
    clear, laid = io.BytesIO(), Image.new("RGB", picture.size, "white")
    Image.merge("RGBA", (*picture.split(), mask)).save(clear, "PNG")
    laid.paste(picture, mask=mask)
    assert (difference_hash(clear.getvalue(), Cleaning()) ^ difference_hash(jpeg(laid), Cleaning())).bit_count() <= 4


def test_hashes_that_many_pictures_share_are_compared_once(tmp_path, monkeypatch):
    count = 20_000
    row, look = np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64)
    look[[7, 9]] = 1, 2**40
    Fingerprints(row, row, row, look).save(tmp_path / "scan")
    compared, compare = [], duplicates._near_in_group
    monkeypatch.setattr(
        duplicates, "_near_in_group", lambda group, radius: compared.append(len(group)) or compare(group, radius)
    )
    found = np.concatenate(list(find_duplicates([tmp_path / "scan"], tmp_path / "work", 3)))
    assert max(compared) == 3
    np.testing.assert_array_equal(found[:, 0], row[1:])
    assert not found[:, 1].any() and (found[:, 2] == 1).all()


def test_no_pictures_have_no_duplicates(tmp_path):
    none = np.empty(0, np.uint64)
    Fingerprints(none, none, none, none).save(tmp_path / "scan")
    assert [block for block in find_duplicates([tmp_path / "scan"], tmp_path / "work", 3) if len(block)] == []
