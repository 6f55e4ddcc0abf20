"""A folder of everything that goes wrong, and what cleaning makes of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from largescale.data.decode import decode
from largescale.data.reader import RawSample
from shards.cleaning.rules import Cleaning
from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.images.reading import ImageError, inspect, opened, to_rgb
from tests.helpers.conversions import stored_images
from tests.helpers.images import encoded, image_bytes, ramp


def bomb() -> bytes:
    """A PNG of a few bytes that says it has ten thousand megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 100)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def turned(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(ramp()), "JPEG", quality=95, exif=exif)


def animation() -> bytes:
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)).quantize(16) for value in (10, 200, 90)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.fixture
def torture(tmp_path: Path) -> Path:
    source = tmp_path / "pile"
    deep = "deep/" * 40 + "deep"
    wide16 = Image.fromarray(ramp()[..., 0].astype(np.uint16) * 257)
    files = {
        "fine.png": image_bytes(40, 30, seed=1),
        "fine.jpg": image_bytes(40, 30, "JPEG", seed=2),
        "photo.jpg": encoded(Image.fromarray(ramp(900, 600)), "JPEG", quality=92),
        "cut.jpg": image_bytes(64, 64, "JPEG")[:900],
        "zero.png": b"",
        "suffix.png": image_bytes(40, 30, "JPEG", seed=3),
        "page.jpg": b"<html>404</html>",
        "bomb.png": bomb(),
        "cmyk.jpg": encoded(Image.fromarray(ramp()).convert("CMYK"), "JPEG", quality=95),
        "deep16.png": encoded(wide16),
        "animated.gif": animation(),
        "turned.jpg": turned(),
        "clear.png": encoded(Image.fromarray(np.dstack([ramp(), 255 - ramp()[..., 0]]))),
        "palette.png": encoded(Image.fromarray(ramp()).quantize(32)),
        "tiny.png": image_bytes(5, 50, seed=4),
        "strip.png": image_bytes(300, 20, seed=5),
        "blank.jpg": encoded(Image.new("RGB", (50, 50), (9, 99, 200)), "JPEG"),
        "ümläut 語.png": image_bytes(40, 30, seed=6),
        "same.name.png": image_bytes(40, 30, seed=7),
        "same_name.png": image_bytes(40, 30, seed=8),
        f"{deep}/x.png": image_bytes(40, 30, seed=9),
        "notes.txt": b"hello",
    }
    for name, payload in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(payload)
    (source / os.fsdecode(b"bytes\xff.png")).write_bytes(image_bytes(40, 30, seed=10))
    (source / "loop").symlink_to(source)
    (source / "loop.png").symlink_to(source)
    (source / "nowhere.png").symlink_to(source / "gone.png")
    return source


def ledger(folder: Path) -> dict[str, str]:
    rows = list(read_ledger(folder / "skipped.parquet"))
    assert len({row["source"] for row in rows}) == len(rows)
    return {row["source"]: row["reason"] for row in rows}


ALWAYS = {
    "cut.jpg": "damaged or cut image",
    "zero.png": "empty file",
    "page.jpg": "not an image",
    "bomb.png": "too many pixels",
    "notes.txt": "not an image file",
    "loop": "a link to a folder",
    "loop.png": "a link to a folder",
    "nowhere.png": "a link that leads nowhere",
}


def test_what_cannot_be_used_is_listed_and_the_rest_keeps_its_bytes(torture, tmp_path):
    convert(torture, tmp_path / "out", Options("pile"))
    assert ledger(tmp_path / "out") == ALWAYS
    stored = stored_images(tmp_path / "out")
    files = [path for path in torture.iterdir() if path.is_file() and path.name not in ALWAYS]
    assert {stored[key] for key in stored} == {path.read_bytes() for path in [*files, *torture.glob("deep/**/x.png")]}
    assert {"same_name", "same_name~2", "fine", "fine~2"} <= stored.keys()


def test_every_rule_leaves_out_what_it_says(torture, tmp_path):
    rules = Cleaning(min_side=10, max_aspect=10, blank=True, animated=True, max_pixels=500_000)
    convert(torture, tmp_path / "out", Options("pile", cleaning=rules))
    assert ledger(tmp_path / "out") == ALWAYS | {
        "tiny.png": "too small",
        "strip.png": "extreme aspect ratio",
        "blank.jpg": "a single colour",
        "animated.gif": "animated",
        "photo.jpg": "too many pixels",
    }


def test_unusual_images_become_plain_ones_that_look_the_same(torture, tmp_path):
    convert(torture, tmp_path / "out", Options("pile", cleaning=Cleaning(plain=True)))
    stored = stored_images(tmp_path / "out")
    for key in stored:
        with Image.open(io.BytesIO(stored[key])) as image:
            assert image.mode in ("RGB", "L") and getattr(image, "n_frames", 1) == 1
            assert image.getexif().get(0x0112, 1) == 1
    seen = {key: np.asarray(Image.open(io.BytesIO(stored[key])).convert("RGB")).astype(int) for key in stored}
    straight = ramp().astype(int)
    assert np.abs(seen["deep16"][..., 0] - straight[..., 0]).max() == 0
    assert np.abs(seen["turned"] - np.rot90(straight, -1)).mean() < 4
    white = straight + (255 - straight) * straight[..., :1] / 255
    assert np.abs(seen["clear"] - white).max() <= 1
    assert np.abs(seen["cmyk"] - straight).mean() < 6
    assert (seen["animated"] == 10).all()
    assert stored["fine"] in {(torture / "fine.png").read_bytes(), (torture / "fine.jpg").read_bytes()}  # untouched


def test_large_images_are_made_smaller_and_small_ones_not_touched(torture, tmp_path):
    convert(torture, tmp_path / "out", Options("pile", cleaning=Cleaning(max_side=256, quality=88)))
    stored = stored_images(tmp_path / "out")
    small = np.asarray(Image.open(io.BytesIO(stored["photo"])))
    assert small.shape == (171, 256, 3)
    expected = Image.fromarray(ramp(900, 600)).resize((256, 171), Image.Resampling.BOX)
    smooth = [
        np.asarray(Image.fromarray(values).resize((32, 21), Image.Resampling.BOX)).astype(int)
        for values in (small, np.asarray(expected))
    ]
    assert np.abs(smooth[0] - smooth[1]).mean() < 4
    assert Image.open(io.BytesIO(stored["strip"])).size == (256, 17)
    untouched = {"turned", "cmyk", "deep16", "tiny", "blank", "palette", "animated"}
    assert {stored[key] for key in untouched} <= {path.read_bytes() for path in torture.iterdir() if path.is_file()}


def test_the_stream_sees_what_a_plain_conversion_stores(torture):
    for name in ("deep16.png", "turned.jpg", "clear.png", "cmyk.jpg", "palette.png", "animated.gif"):
        payload = (torture / name).read_bytes()
        with opened(payload) as image:
            raw = RawSample(memoryview(payload), *image.size)
            expected = np.asarray(to_rgb(image))
        np.testing.assert_array_equal(decode(raw, max_pixels=10**9).permute(1, 2, 0).numpy(), expected)


def test_profiles_are_converted_where_asked():
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    payload = encoded(Image.fromarray(ramp()), "PNG", icc_profile=wide)
    assert Cleaning().apply(payload, "png")[:2] == (payload, "png")
    same, suffix, _ = Cleaning(srgb=True).apply(payload, "png")  # a profile of another colour space says nothing
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(same))), ramp())
    assert suffix == "png" and "icc_profile" not in Image.open(io.BytesIO(same)).info


def test_header_checks_come_before_decoding(monkeypatch):
    small = image_bytes(50, 50, "JPEG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="too many pixels"):
        Cleaning().apply(bomb(), "png")
    with pytest.raises(ImageError, match="too small"):
        Cleaning(min_side=100).apply(small, "jpg")


def test_a_page_shows_what_is_there_and_what_was_left_out(torture, tmp_path, capsys):
    rules = Cleaning(min_side=10, max_aspect=10, blank=True, animated=True)
    convert(torture, tmp_path / "out", Options("pile", cleaning=rules))
    assert main(["info", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    assert f"page: {tmp_path / 'page.html'}" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    kept, left_out = page.split("What was left out")
    assert kept.count("<figure>") == len(stored_images(tmp_path / "out")) and kept.count("<svg") == 4
    drawn = ("a single colour", "extreme aspect ratio", "animated", "too small")
    for reason, shown in [*((reason, True) for reason in drawn), ("too many pixels", False), ("empty file", False)]:
        assert f"<td>{reason}</td>" in left_out and (f">{reason}: " in left_out) == shown, reason
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_side", -1),
        ("max_side", -5),
        ("max_side", 70_000),
        ("max_pixels", -1),
        ("max_aspect", 0.5),
        ("max_aspect", float("nan")),
        ("max_aspect", float("inf")),
        ("quality", 0),
        ("quality", 500),
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path, capsys, key, value):
    option = f"--{key.replace('_', '-')}"
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), f"{option}={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}={value}: expected ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        "--radius=-1",
        "--radius=65",
        "--shuffle=-1",
        "--holdout=nan",
        "--holdout=1.5",
        "--samples-per-shard=0",
        "--workers=0",
    ],
)
def test_options_out_of_range_are_one_line(tmp_path, capsys, option):
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: expected ") and error.count("\n") == 1


def test_verify_decodes_what_a_larger_limit_let_in(tmp_path, capsys, monkeypatch):
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "1.png").write_bytes(image_bytes(40, 30))
    monkeypatch.setitem(inspect.__kwdefaults__, "max_pixels", 100)
    convert(tmp_path / "pile", tmp_path / "out", Options("pile", cleaning=Cleaning(max_pixels=5000)))
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0
