"""Suffixes lie: what is an image, and which, is decided by the content, wherever it lies.

Covers: shards/images/formats.py, shards/images/heif.py
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.cleaning.rules import Cleaning
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.images.formats import can_read, format_of
from shards.inspection.index import index_folder
from shards.inspection.verify import verify
from tests.helpers.conversions import stored_images
from tests.helpers.images import image_bytes

pillow_heif = pytest.importorskip("pillow_heif")

FILES = {
    "a.jfif": image_bytes(40, 30, "JPEG", seed=1),
    "b.jpe": image_bytes(40, 30, "JPEG", seed=2),
    "c": image_bytes(40, 30, "JPEG", seed=3),
    "d.pgm": b"P5 4 3 255\n" + bytes(range(12)),
    "E.JPG": image_bytes(seed=5),
    "f.dat": image_bytes(40, 30, "WEBP", seed=6),
    "g.heic": image_bytes(40, 30, "JPEG", seed=7),
    "h.jp2": image_bytes(40, 30, "GIF", seed=8),
    "i.jpg": image_bytes(40, 30, seed=9),
}
STORED = {"a.jpg", "b.jpg", "c.jpg", "d.ppm", "E.jpg", "f.webp", "g.jpg", "h.gif", "i.jpg"}
OTHERS = {
    "notes.txt": image_bytes(40, 30, seed=11),
    "k.xyz": b"not an image",
    "l": b"",
    "m.dng": b"II*\0" + bytes(99),
    "n.jxl": b"\xff\x0a" + bytes(99),
    "o.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99),
}
REASONS = {
    "notes.txt": "not an image file",
    "k.xyz": "not an image file",
    "l": "not an image file",
    "m.dng": "a camera's raw file: develop it to JPEG or TIFF first",
    "n.jxl": "format JPEG XL is not supported: convert it to PNG or JPEG first",
    "o.jp2": "format JPEG 2000 is not supported: convert it to PNG or JPEG first",
}


def write_folder(place: Path) -> Path:
    place.mkdir()
    for name, payload in (FILES | OTHERS).items():
        (place / name).write_bytes(payload)
    return place


def write_zip(place: Path) -> Path:
    place = place.with_suffix(".zip")
    with zipfile.ZipFile(place, "w") as archive:
        for name, payload in (FILES | OTHERS).items():
            archive.writestr(name, payload)
    return place


def write_tar(place: Path) -> Path:
    place = place.with_suffix(".tar")
    with tarfile.open(place, "w") as archive:
        for name, payload in (FILES | OTHERS).items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    return place


def write_list(place: Path) -> Path:
    write_folder(place)
    place = place.with_suffix(".jsonl")
    place.write_text("".join(json.dumps({"path": f"{place.stem}/{name}"}) + "\n" for name in FILES | OTHERS))
    return place


@pytest.mark.parametrize("write", [write_folder, write_zip, write_tar, write_list])
def test_the_content_decides_what_is_an_image(tmp_path, write):
    manifest = convert(write(tmp_path / "pile"), tmp_path / "out", Options("pile"))
    stored = stored_images(tmp_path / "out")
    assert sorted(stored.values()) == sorted(FILES.values())
    with tarfile.open(tmp_path / "out" / "pile-000000.tar") as tar:
        names = {name.rpartition("/")[2] for name in tar.getnames()}
    if write is write_list:
        names = {name.partition("_")[2] for name in names} - {name for name in names if name.endswith("json")}
    assert names == STORED
    found = {
        row["source"].rpartition("/")[2].rpartition(":")[2]: row["reason"]
        for row in read_ledger(tmp_path / "out" / "skipped.parquet")
    }
    if write is write_tar:  # of a sample without an image no member is named
        found = {key.removesuffix("*").removesuffix("."): reason for key, reason in found.items()}
        expected = {
            name if name in ("n.jxl", "o.jp2") else name.partition(".")[0]: reason
            for name, reason in REASONS.items()
            if name != "m.dng"
        } | {"m": "not an image file"}
    else:
        expected = REASONS | ({"k.xyz": "not an image", "l": "empty file"} if write is write_list else {})
    assert found == expected
    assert manifest.num_samples == len(FILES) and verify(tmp_path / "out", workers=1, decode=True)[1] == []


def test_tars_of_others_are_indexed_by_the_content_too(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "pile")
    assert index_folder(tmp_path / "tars", workers=1).num_samples == len(FILES)
    assert verify(tmp_path / "tars", workers=1, decode=True)[1] == []


def phone_photograph(form: str) -> bytes:
    rows, columns = np.mgrid[:48, :64]
    stored, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    pillow_heif.register_heif_opener()
    Image.fromarray(np.stack([4 * columns, 5 * rows, rows + 2 * columns], 2).astype(np.uint8)).save(
        stored, form, quality=95, exif=exif
    )
    return stored.getvalue()


@pytest.mark.parametrize(("form", "name"), [("HEIF", "HEIC"), ("AVIF", "AVIF")])
def test_what_phones_write_becomes_jpegs_where_images_may_change(tmp_path, form, name):
    payload = phone_photograph(form)
    assert format_of(payload) == name
    if not can_read(name):
        pytest.skip(f"this Pillow has no {name}")
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "photo.HEIC").write_bytes(payload)
    (tmp_path / "pile" / "other.png").write_bytes(image_bytes(40, 30))
    convert(tmp_path / "pile", tmp_path / "kept", Options("kept", duplicates="near"))
    assert [row["reason"] for row in read_ledger(tmp_path / "kept" / "skipped.parquet")] == [
        f"format {name} needs shards convert --plain"
    ]
    convert(tmp_path / "pile", tmp_path / "plain", Options("plain", duplicates="near", cleaning=Cleaning(plain=True)))
    with Image.open(io.BytesIO(stored_images(tmp_path / "plain")["photo"])) as stored:
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(payload))).convert("RGB")
        assert stored.format == "JPEG" and stored.size == expected.size and stored.getexif().get(0x0112, 1) == 1
        assert np.abs(np.asarray(stored).astype(int) - np.asarray(expected)).mean() < 4


def test_without_a_library_the_reason_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    can_read.cache_clear()
    from shards.images.formats import needs

    try:
        assert needs("HEIC") == "format HEIC needs pip install 'largescale[heif]' and shards convert --plain"
    finally:
        can_read.cache_clear()
