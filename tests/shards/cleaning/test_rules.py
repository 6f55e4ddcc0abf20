"""A folder of everything that goes wrong, and what cleaning makes of it.

Covers: shards/inspection/info.py, shards/inspection/page.py
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from largescale.data.decode import EncodedImage, decode
from largescale.data.reader import RawSample, SampleError
from shards.cleaning.duplicates import difference_hash
from shards.cleaning.rules import Cleaning
from shards.cli import main
from shards.conversion.convert import Options, convert
from shards.format.ledger import read_ledger
from shards.images.reading import ImageError, inspect, opened, to_rgb
from shards.inspection.info import Tally
from tests.helpers.conversions import stored_images
from tests.helpers.images import image_bytes


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stored = io.BytesIO()
    image.save(stored, file_format, **options)
    return stored.getvalue()


def ramp(width: int = 64, height: int = 48) -> np.ndarray:
    """A picture with no symmetry, so that turning and colour mistakes show."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x % 256, 5 * y % 256, (x + 2 * y) % 256], axis=2).astype(np.uint8)


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


def stray_bytes(payload: bytes) -> bytes:
    """A JPEG with two bytes that belong to nothing before its last marker: only some decoders forgive that."""
    return payload[:-2] + b"\x12\x34" + payload[-2:]


def swapped_profile() -> bytes:
    """A colour profile in which red and green changed places, so that a conversion cannot be overlooked."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def test_no_program_is_started_for_postscript_in_disguise(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="not an image"):
        Cleaning().apply(postscript, "jpg")
    with pytest.raises(ImageError, match="not an image"):
        difference_hash(postscript, Cleaning())
    with pytest.raises(SampleError):
        decode(RawSample(memoryview(postscript), 100, 100), max_pixels=10**9)


def test_common_formats_that_shards_do_not_hold_have_a_reason_of_their_own():
    for name, head in (
        ("AVIF", b"\0\0\0\x1cftypavif"),
        ("HEIC", b"\0\0\0\x1cftypheic"),
        ("HEIC", b"\0\0\0\x1cftypmif1"),
        ("JPEG 2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
        ("JPEG XL", b"\xff\x0a"),
    ):
        for read in (lambda payload: Cleaning(decode=False).apply(payload, "jpg"), partial(inspect, decode=False)):
            with pytest.raises(ImageError, match=f"^format {name} (needs|is not supported)"):
                read(head + bytes(99))


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


def test_the_limit_of_pixels_is_the_one_that_was_given():
    large = encoded(Image.new("1", (20_000, 20_000)), "PNG", compress_level=1)
    with pytest.raises(ImageError, match="too many pixels"):
        Cleaning().apply(large, "png")
    for limit in (0, 400_000_000):
        assert Cleaning(max_pixels=limit, decode=False).apply(large, "png")[2].width == 20_000


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("rules", [Cleaning(srgb=True), Cleaning(max_side=32)])
def test_what_is_stored_anew_is_converted_from_its_profile(mode, rules):
    image = Image.new("RGB", (64, 48), (200, 30, 30))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    stored, _, _ = rules.apply(encoded(image, "PNG", icc_profile=swapped_profile()), "png")
    with Image.open(io.BytesIO(stored)) as seen:
        red, green, _ = np.asarray(seen.convert("RGB")).mean((0, 1))
        assert "icc_profile" not in seen.info and green > red + 50


def test_photographs_are_converted_from_their_profile_after_they_are_made_smaller():
    photo = encoded(Image.new("RGB", (640, 480), (200, 30, 30)), "JPEG", icc_profile=swapped_profile())
    stored, _, facts = Cleaning(max_side=100).apply(photo, "jpg")
    red, green, _ = np.asarray(Image.open(io.BytesIO(stored))).mean((0, 1))
    assert (facts.width, facts.height) == (100, 75) and green > red + 50


def test_colours_of_16_bits_are_not_plain():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp().astype(np.uint16) * 257)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    deep = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    stored, _, _ = Cleaning(plain=True).apply(deep, "png")
    assert stored[24] == 8, "bit depth of the header"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), ramp())
    ppm = b"P6 64 48 65535\n" + (ramp().astype(">u2") * 257).tobytes()
    assert Cleaning(plain=True).apply(ppm, "ppm")[1] == "png"


def test_a_jpeg_that_pillow_does_not_read_is_made_plain():
    payload = encoded(Image.fromarray(ramp()), "JPEG", quality=95)
    odd = payload[:2] + b"\xff\x01" + payload[2:]  # a marker without a meaning, which libjpeg skips
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(io.BytesIO(odd))
    stored, suffix, _ = Cleaning(plain=True).apply(odd, "jpg")
    assert suffix == "jpg" and Image.open(io.BytesIO(stored)).size == (64, 48)


def test_a_transparent_colour_is_not_plain():
    payload = encoded(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    stored, _, _ = Cleaning(plain=True).apply(payload, "png")
    assert (np.asarray(Image.open(io.BytesIO(stored))) == 255).all()


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_floats_are_scaled_by_the_range_that_holds_them(top):
    grey = ramp()[..., 0]
    image = Image.fromarray(grey.astype(np.float32) * (top / 255))
    stored, _, _ = Cleaning(plain=True).apply(encoded(image, "TIFF"), "tiff")
    assert np.abs(np.asarray(Image.open(io.BytesIO(stored)))[..., 0].astype(int) - grey).max() <= 1


def test_numbers_without_a_usual_range_are_stretched():
    image = Image.fromarray(np.linspace(-5, 10**6, 64 * 48, dtype=np.float32).reshape(48, 64))
    seen = np.asarray(to_rgb(image))
    assert seen.min() == 0 and seen.max() == 255


def test_a_jpeg_that_one_decoder_refuses_is_read_by_the_other():
    good = encoded(Image.fromarray(ramp(640, 480)), "JPEG")
    payload = stray_bytes(good)
    assert Cleaning().apply(payload, "jpg")[0] == payload
    stored, _, facts = Cleaning(max_side=64).apply(payload, "jpg")
    assert (facts.width, facts.height) == (64, 48) and stored != payload
    whole = decode(RawSample(memoryview(payload), 640, 480), max_pixels=10**9)
    expected = decode(RawSample(memoryview(good), 640, 480), max_pixels=10**9)
    assert (whole.int() - expected.int()).abs().float().mean() < 2
    small = EncodedImage(RawSample(memoryview(payload), 640, 480), max_pixels=10**9).decode(4)
    assert small.shape == (3, 120, 160)


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
