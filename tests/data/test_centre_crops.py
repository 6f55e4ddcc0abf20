"""Images as evaluation sees them: those of the resize and crop that they are defined by, however they are loaded."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from largescale.config import Config, load_config
from largescale.data.centre_crops import CentreCropMaker, centre_crop, centre_crops
from largescale.data.corpora import Corpus, open_corpus
from largescale.data.decode import decode
from shards.cli import main as shards
from shards.ground.errors import InputError
from tests.helpers.commands import TINY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three large JPEGs of smooth content, one of them stored sideways, and a small PNG."""
    source, out = (tmp_path_factory.mktemp("photos") / name for name in ("images", "shards"))
    source.mkdir()
    y, x = np.mgrid[0:600, 0:800]
    for number in range(3):
        waves = [128 + 100 * np.sin(x / (30 + 9 * number + 5 * c)) * np.cos(y / (40 + 7 * c)) for c in range(3)]
        image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        image.save(source / f"{number}.jpg", quality=95, exif=exif)
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(source / "small.png")
    assert shards(["convert", str(source), str(out), "--workers", "1"]) == 0
    return out


def settings(folder: Path, *overrides: str) -> tuple[Config, Corpus]:
    config = load_config(TINY, [f"data.shards={folder}", "evaluate.resize=64", "evaluate.size=56", *overrides])
    return config, open_corpus(str(folder), config.data)


def all_crops(folder: Path, batches: list[np.ndarray], *overrides: str) -> tuple[list[int], list[str], torch.Tensor]:
    config, corpus = settings(folder, *overrides)
    found = list(map(_kept, centre_crops([corpus], config, batches, CPU, keys=True)))
    return (
        [one for ids, _, _ in found for one in ids],
        [key for _, keys, _ in found for key in keys],
        torch.cat([images for _, _, images in found]),
    )


def _kept(crops):
    return crops.ids.tolist(), crops.keys, crops.images.clone()


def test_crops_do_not_depend_on_batches_processes_or_threads(photos):
    ids, keys, images = all_crops(photos, [np.arange(4)])
    assert ids == [0, 1, 2, 3] and len(set(keys)) == 4 and images.shape == (4, 3, 56, 56)
    for batches, loading in (([[3, 1], [2, 0]], "data.workers=2"), ([[1], [0, 3, 2]], "data.threads=3")):
        order = [one for batch in batches for one in batch]
        again = all_crops(photos, [np.array(batch) for batch in batches], loading)
        assert again[0] == order and again[1] == [keys[one] for one in order]
        assert torch.equal(again[2], images[order])


def test_reduced_decoding_is_near_and_none_is_exact(photos):
    config, corpus = settings(photos, "data.scaled_decode=0")
    maker = CentreCropMaker([corpus], config)
    reduced = CentreCropMaker([corpus], settings(photos)[0])
    for number in range(4):
        exact = centre_crop(decode(maker.reader.read(number), max_pixels=10**7), 64, 56)
        assert torch.equal(maker.crop(number), exact)
        assert (
            reduced.crop(number).float() - exact.float()
        ).abs().mean() < 2.5  # of 255; a turned one would be far off


def test_a_lost_shard_ends_an_evaluation_and_is_left_out_where_it_is_to_be(photos, tmp_path):
    bad = Path(shutil.copytree(photos, tmp_path / "bad"))
    next(bad.glob("*.tar")).write_bytes(b"")
    config, corpus = settings(bad)
    with pytest.raises(InputError, match="truncated or replaced"):
        list(centre_crops([corpus], config, [np.arange(4)], CPU))
    [crops] = centre_crops([corpus], config, [np.arange(4)], CPU, without_lost=True)
    assert len(crops.images) == 0 and [row["key"] for row in crops.skipped] == all_crops(photos, [np.arange(4)])[1]


def test_an_image_too_thin_to_be_resized_is_named_and_left_out(tmp_path, caplog):
    source = tmp_path / "images"
    source.mkdir()
    for width, height in ((1, 20_000), (20_000, 1), (10, 600), (50, 40)):
        Image.new("RGB", (width, height), "red").save(source / f"{width}-{height}.png")
    assert shards(["convert", str(source), str(tmp_path / "shards"), "--workers", "1"]) == 0
    with caplog.at_level(logging.WARNING):
        _, keys, images = all_crops(tmp_path / "shards", [np.arange(4)], "data.max_pixels=100000")
    assert sorted(keys) == ["10-600", "50-40"] and (images.float().mean((0, 2, 3)) == torch.tensor([255, 0, 0])).all()
    assert "1-20000, is left out: 1 x 20000 pixels, 64 x 1280000 once resized, more than data.max_pixels" in caplog.text
    assert "20000-1, is left out: 20000 x 1 pixels, 1280000 x 64 once resized" in caplog.text


def test_an_image_that_cannot_be_read_is_named_and_left_out(photos, caplog):
    with caplog.at_level(logging.WARNING):
        ids, _, images = all_crops(photos, [np.arange(4)], "data.max_pixels=10000")
    assert len(ids) == len(images) == 1 and caplog.text.count("is left out") == 3
    assert "more than data.max_pixels" in caplog.text
