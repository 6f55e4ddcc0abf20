"""The orientation of an image: Pillow's where that reads the metadata, and never an exception."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shards.images.orientation import TAG, UPRIGHT, first_of, of_exif, of_xmp, turned
from shards.images.reading import read_rgb
from tests.helpers.images import exif_block, with_exif


def picture() -> Image.Image:
    """Smooth, without a symmetry."""
    rows, columns = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([4 * columns, 5 * rows, rows + 2 * columns], 2).astype(np.uint8))


def jpeg_bytes(**options: object) -> bytes:
    stored = io.BytesIO()
    picture().save(stored, "JPEG", quality=95, **options)
    return stored.getvalue()


ENTRY = st.tuples(
    st.sampled_from([TAG, TAG, 0x10F, 0x11A, 0x131, 0x8769, 0xA000]),
    st.integers(0, 19),
    st.sampled_from([0, 1, 1, 1, 2, 3, 2**31]),
    st.one_of(st.integers(0, 9).map(lambda n: struct.pack("<HH", n, 0)), st.binary(min_size=4, max_size=4)),
)


@settings(max_examples=100, deadline=None)
@example(entries=[(0x10F, 5, 1, b"\0\0\0\1"), (TAG, 3, 1, b"\2\0\0\0")], order="<", tail=b"", cut=0)
@given(
    entries=st.lists(ENTRY, max_size=4, unique_by=lambda entry: entry[0]),
    order=st.sampled_from("<>"),
    tail=st.binary(max_size=20),
    cut=st.integers(0, 30),
)
def test_it_is_pillows_wherever_that_does_not_raise(entries, order, tail, cut):
    block = exif_block(entries, order) + tail
    block = block[: len(block) - cut] if cut < 20 else block
    found, pillows = of_exif(block), Image.Exif()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pillows.load(block)
            value = pillows.get(TAG)
            expected = value if isinstance(value, (int, float)) or hasattr(value, "numerator") else UPRIGHT
            is_there = TAG in pillows
    except Exception:
        assert found is None or 1 <= found <= 8
        return
    if is_there and value is not None:
        assert found == (int(expected) if expected in range(1, 9) else UPRIGHT) or len(block) < 26
    else:
        # Pillow stops at an entry whose value lies beyond the end; a tag behind it is still good.
        stopped = any("Truncated" in str(one.message) or "Corrupt" in str(one.message) for one in said)
        assert found in (None, UPRIGHT) or stopped


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_seen_as_pillow_shows_it(orientation):
    exif = Image.Exif()
    exif[TAG] = orientation
    payload = jpeg_bytes(exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))))
    np.testing.assert_array_equal(read_rgb(payload), expected)
    np.testing.assert_array_equal(turned(np.asarray(Image.open(io.BytesIO(payload))), orientation), expected)


SIX = (TAG, 3, 1, struct.pack("<HH", 6, 0))
UPRIGHT_JPEG = jpeg_bytes()


@pytest.mark.parametrize(
    "blocks",
    [
        [exif_block([SIX, (0x11A, 2, 3, b"72\0\0")])],
        [exif_block([SIX, (0x131, 11, 1, struct.pack("<f", 1.5))])],
        [exif_block([SIX]), exif_block([(TAG, 3, 1, struct.pack("<HH", 3, 0))])],
        [b"Exif\0\0" + exif_block([SIX])],
        [exif_block([SIX]), b"Exif\0\0garbage"],
        [b"Exif\0\0garbage!", exif_block([SIX])],
        [exif_block([SIX, (0x8769, 4, 1, struct.pack("<I", 2**31))])],
        [exif_block([SIX, (0x10F, 99, 2**31, b"\xff" * 4)])],
        [b'http://ns.adobe.com/xap/1.0/\0<rdf tiff:Orientation="6"/>'],
        [exif_block([SIX]), b'http://ns.adobe.com/xap/1.0/\0<rdf tiff:Orientation="3"/>'],
    ],
)
def test_odd_metadata_do_not_keep_a_photograph_from_being_turned(blocks):
    payload = with_exif(UPRIGHT_JPEG, *blocks)
    np.testing.assert_array_equal(read_rgb(payload), np.rot90(read_rgb(UPRIGHT_JPEG), -1))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(9),
        b"Exif\0\0MM\0*",
        b"Exif\0\0" * 9,
        exif_block([(TAG, 3, 1, struct.pack("<HH", 77, 0))]),
        exif_block([(TAG, 2, 1, b"6\0\0\0")]),
    ],
)
def test_what_says_nothing_leaves_a_photograph_as_it_is(block):
    np.testing.assert_array_equal(read_rgb(with_exif(UPRIGHT_JPEG, block)), read_rgb(UPRIGHT_JPEG))


def test_xmp_counts_where_exif_says_nothing():
    assert of_xmp(b"<tiff:Orientation>8</tiff:Orientation>") == 8 and of_xmp(b"nothing") is None
    assert first_of([exif_block([SIX])], b'tiff:Orientation="3"') == 6
    assert first_of([exif_block([])], b'tiff:Orientation="3"') == 3
    assert first_of([], b"") == UPRIGHT
