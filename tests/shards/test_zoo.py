"""Conversion with every option, verification, training and evaluation agree on what is an image, and how it is seen.

Covers: shards/images/jpeg.py, shards/images/png.py, shards/images/tiff.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from largescale.config import Config
from largescale.data.centre_crops import CentreCropMaker
from largescale.data.corpora import open_corpora
from largescale.data.decode import EncodedImage
from largescale.data.reader import SampleError, ShardReader
from shards.cleaning.duplicates import image_hashes
from shards.cleaning.rules import Cleaning
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.inspection.verify import verify
from tests.shards.specimens import Specimen
from tests.shards.zoo import zoo

RULES = {
    "kept": Cleaning(),
    "plain": Cleaning(plain=True),
    "small": Cleaning(max_side=20),
    "srgb": Cleaning(srgb=True),
    "blank": Cleaning(blank=True),
    "all": Cleaning(plain=True, srgb=True, max_side=36, blank=True),
    "animated": Cleaning(animated=True),
    "headers": Cleaning(decode=False),
}


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "pile"
    folder.mkdir()
    for specimen in zoo():
        (folder / specimen.name).write_bytes(specimen.payload)
    return folder


def is_kept(one: Specimen, rules: Cleaning) -> bool:
    """Whether an image can be seen where these rules hold, and they do not leave it out."""
    stored_anew = rules.plain or (rules.max_side and one.seen is not None and max(one.seen.shape) > rules.max_side)
    return one.seen is not None and bool(stored_anew or not one.foreign) and not (rules.animated and one.is_animated)


def reader_of(folder: Path) -> tuple[ShardReader, CentreCropMaker]:
    config = Config(name="zoo")
    config.data.shards, config.evaluate.resize, config.evaluate.size = str(folder), 16, 16
    corpora = open_corpora(config.data)
    return ShardReader(corpora), CentreCropMaker(corpora, config)


def unreadable(folder: Path) -> dict[str, set[str]]:
    """Keys that cannot be read, by who says so."""
    reader, evaluation = reader_of(folder)
    found: dict[str, set[str]] = {
        "verify": {problem.key for problem in verify(folder, workers=1, decode=True)[1]},
        "training": set(),
        "evaluation": set(),
    }
    for number in range(len(reader)):
        try:
            EncodedImage(reader.read(number), max_pixels=10**9).decode()
        except SampleError:
            found["training"].add(reader.key(number))
        try:
            evaluation.crop(number)
        except SampleError:
            found["evaluation"].add(reader.key(number))
    return found


def stored(folder: Path) -> dict[str, np.ndarray]:
    """How training sees each image, by its key."""
    reader, _ = reader_of(folder)
    return {
        reader.key(number): EncodedImage(reader.read(number), max_pixels=10**9).decode().permute(1, 2, 0).numpy()
        for number in range(len(reader))
    }


def box(pixels: np.ndarray) -> np.ndarray:
    """4 x 4 means, which a resize leaves alone."""
    return np.asarray(Image.fromarray(pixels).resize((4, 4), Image.Resampling.BOX)).astype(int)


def test_the_zoo_is_large():
    specimens = zoo()
    assert len(specimens) > 350 and sum(specimen.seen is None for specimen in specimens) > 60


@pytest.mark.parametrize("name", [name for name in RULES if name != "headers"])
def test_what_can_be_seen_is_kept_and_seen_rightly(pile, tmp_path, name):
    rules = RULES[name]
    manifest = convert(pile, tmp_path / name, Options("zoo", cleaning=rules))
    reasons = {row["source"]: row["reason"] for row in read_ledger(tmp_path / name / "skipped.parquet")}
    expected = {one.name for one in zoo() if not is_kept(one, rules)}
    assert reasons.keys() == expected
    for specimen in zoo():
        if specimen.seen is None and specimen.reason and not (rules.animated and specimen.is_animated):
            assert reasons[specimen.name] == specimen.reason, specimen.name
        if specimen.foreign and specimen.seen is not None and specimen.name in reasons:
            assert reasons[specimen.name] == f"format {specimen.foreign} needs shards convert --plain"
    assert manifest.num_samples == len(zoo()) - len(reasons)
    assert unreadable(tmp_path / name) == {"verify": set(), "training": set(), "evaluation": set()}
    left = iter(stored(tmp_path / name).items())
    wrong = []
    for specimen in sorted((one for one in zoo() if one.name not in reasons), key=lambda one: one.name):
        _, pixels = next(left)
        if rules.max_side and max(specimen.seen.shape) > rules.max_side:
            off = np.abs(box(pixels) - box(np.ascontiguousarray(specimen.seen))).mean() - 1.5
        else:
            off = np.abs(pixels.astype(int) - specimen.seen).mean() if pixels.shape == specimen.seen.shape else 999
        if off > specimen.tolerance:
            wrong.append((specimen.name, round(float(off), 1)))
    assert not wrong


def test_what_only_decoding_shows_is_found_by_all_alike(pile, tmp_path):
    convert(pile, tmp_path / "headers", Options("zoo", cleaning=RULES["headers"]))
    left_out = {row["source"] for row in read_ledger(tmp_path / "headers" / "skipped.parquet")}
    assert left_out == {one.name for one in zoo() if one.foreign or (one.seen is None and not one.headers_are_whole)}
    found = unreadable(tmp_path / "headers")
    assert found["verify"] == found["training"] == found["evaluation"]
    assert len(found["verify"]) == sum(one.seen is None and one.headers_are_whole for one in zoo())


def test_the_search_for_duplicates_hashes_what_can_be_seen():
    for specimen in zoo():
        for rules in (Cleaning(), Cleaning(plain=True)):
            assert (image_hashes(specimen.payload, rules, look=True) is not None) == is_kept(specimen, rules), specimen
