"""The page about a curation, as a real browser renders it.

Covers: largescale/curate/pictures.py, largescale/curate/sizes_plot.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from largescale.curate.command import Places, curate
from largescale.curate.embeddings import read_embeddings
from largescale.curate.pictures import Pictures
from largescale.curate.wish import Wish
from largescale.data.corpora import Corpus
from largescale.data.reader import ShardReader
from largescale.report.gallery import data_url, no_picture, picture
from shards.format.manifest import read_manifest
from tests.helpers.browser import SCREENS, check_structure, on_screens
from tests.helpers.piles import long_tail, write_features

WISH = Wish(levels=(60, 12), target=150, epsilon=1e-4, rounds=1, iterations=5, coarse=5)


def page_of(features: Path, out: Path, wish: Wish, shards: Path | None = None) -> str:
    curate(Places(features, out, shards), wish, torch.device("cpu"))
    return (out / "curation.html").read_text()


@pytest.fixture(scope="module")
def with_thumbnails(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    features = write_features(folder / "features", long_tail(600), thumbnails=20)
    page_of(features, folder / "out", WISH)
    return folder / "out" / "curation.html"


def test_the_page_says_what_was_kept_and_shows_it(with_thumbnails):
    page = with_thumbnails.read_text()
    check_structure(page)
    assert "150 of 600 images kept" in page and "level 2" in page and "cosine 1.0000" in page
    assert page.count("<figure") >= 6 * 4 + 2 * 24 and "None was cut" not in page
    assert "mathdefault" not in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_nothing_on_it_is_broken_on_any_screen(with_thumbnails, tmp_path):
    for screen in on_screens(with_thumbnails, tmp_path):
        assert screen["errors"] == screen["broken"] == screen["unnamed"] == 0 and screen["overflow"] <= 0, screen
        assert screen["images"] > 60 and screen["plots"] == 2
    assert len(SCREENS) == 4


def test_without_pictures_it_says_how_to_have_some(tmp_path):
    features, places = tmp_path / "features", Places(tmp_path / "features", tmp_path / "out")
    wish, device = Wish(epsilon=1e-4), torch.device("cpu")
    page = page_of(write_features(features, long_tail(200)), places.out, wish)
    check_structure(page)
    assert "remove this folder, and run the command again with --shards DIR" in page
    assert "<figure" not in page and "coarse clusters" in page
    assert curate(places, wish, device).endswith("; nothing to do")
    write_features(features, long_tail(200), thumbnails=8)
    told = f"; its page was made without pictures: to have them, remove {places.out} and run the command again"
    assert curate(places, wish, device).endswith(told)
    shutil.rmtree(places.out)
    assert "<figure" in page_of(features, places.out, wish)
    assert curate(places, wish, device).endswith("; nothing to do")


def test_an_image_whose_file_has_no_thumbnails_is_grey(tmp_path):
    write_features(tmp_path / "with", long_tail(30), of_shard=10, thumbnails=8)
    write_features(tmp_path / "without", long_tail(30), of_shard=10)
    for place in range(3):  # of the second shard alone
        name = f"pile-{place:06d}.parquet"
        (tmp_path / ("with" if place == 1 else "without") / name).rename(tmp_path / name)
    pictures, grey = Pictures(read_embeddings(tmp_path), None), data_url(no_picture())
    assert pictures.are_there
    assert [pictures.url(sample) == grey for sample in (9, 10, 19, 20)] == [True, False, False, True]


def test_pictures_come_from_the_shards_that_are_passed(shard_folder, tmp_path):
    manifest = read_manifest(shard_folder)
    sums = {entry.name: entry.checksum for entry in manifest.shards}
    rows = np.repeat(np.eye(100), 2, axis=0)  # of every two samples, the second is a copy
    features = write_features(tmp_path / "features", rows, of_shard=40, name="train", checksums=sums)
    wish = Wish(epsilon=1e-4, coarse=1)
    page_of(features, tmp_path / "out", wish)
    said = curate(Places(features, tmp_path / "out", shard_folder), wish, torch.device("cpu"))
    assert said.endswith(
        f"nothing to do; its page was made without pictures: to have them, remove {tmp_path / 'out'} "
        "and run the command again"
    )
    shutil.rmtree(tmp_path / "out")
    page = page_of(features, tmp_path / "out", wish, shard_folder)
    reader = ShardReader([Corpus(manifest)])
    urls = [data_url(picture(reader, sample)) for sample in range(200)]
    pairs = page[page.index("<h2>Duplicates</h2>") :]
    shown = [sample for sample in range(1, 200, 2) if f'"{urls[sample]}" alt="sample {sample}, dropped"' in pairs]
    assert len(shown) == 24
    assert all(f'"{urls[sample - 1]}" alt="sample {sample - 1}, cosine 1.0000"' in pairs for sample in shown)
