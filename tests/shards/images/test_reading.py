"""What is unusual about images, and what becomes of it: profiles, depths, ranges, markers that decoders disagree on."""

from __future__ import annotations

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageCms

from largescale.data.decode import EncodedImage, decode
from largescale.data.reader import RawSample, SampleError
from shards.cleaning.duplicates import difference_hash
from shards.cleaning.rules import Cleaning
from shards.images.reading import ImageError, inspect, to_rgb
from tests.helpers.images import encoded, ramp


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
