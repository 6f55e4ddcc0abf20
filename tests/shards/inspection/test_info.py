"""Covers: shards/inspection/page.py"""

from __future__ import annotations

import os

import numpy as np

from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.inspection.info import Tally
from tests.helpers.images import image_bytes


def test_a_page_copes_with_what_lies_in_the_source(tmp_path, capsys, monkeypatch):
    source = tmp_path / "pile"
    for name in (r"$\foo$", "a", "$"):
        (source / name).mkdir(parents=True)
        (source / name / "1.png").write_bytes(image_bytes(30, 20))
    os.mkfifo(source / "pipe.txt")
    (source / "notes.txt").write_bytes(image_bytes(30, 20))
    (source / "large.txt").write_bytes(image_bytes(300, 200))
    monkeypatch.setattr("shards.inspection.page._SHOWN_BYTES", 10_000)
    convert(source, tmp_path / "out", Options("pile", labels="folder"))
    assert main(["info", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "notes.txt" in page and "pipe.txt" not in page and "large.txt" not in page


def test_a_small_folder_has_a_size_names_of_its_images_and_ticks_that_are_numbers(tmp_path):
    (tmp_path / "pile").mkdir()
    for number, side in enumerate((20, 40, 80, 160)):
        (tmp_path / "pile" / f"photo{number}.png").write_bytes(image_bytes(side, 30))
    convert(tmp_path / "pile", tmp_path / "out", Options("pile"))
    assert main(["info", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert " MB, from pile" in page and "0.00 GB" not in page
    assert "photo3 (pile-000000.tar, " in page
    assert "<!-- 0.5 -->" in page and "times" not in page  # matplotlib names what it draws


def test_numbers_are_counted_shard_by_shard():
    tally, rng = Tally(), np.random.default_rng(0)
    sides = rng.integers(1, 5000, (4, 1000)).astype(np.uint32)
    for part in sides:
        tally.add(part)
    assert tally.counts.sum() == 4000 and (tally.values == np.unique(sides)).all()
    assert tally.quantile(0.5) == np.quantile(sides, 0.5, method="inverted_cdf")
    fractions = Tally()
    fractions.add(rng.uniform(0.01, 100, 10**6))
    assert len(fractions.values) < 40_000 and fractions.counts.sum() == 10**6
    assert abs(fractions.quantile(0.5) - 50) < 0.5
