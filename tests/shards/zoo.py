"""Several hundred small images made by code: formats, colour models, depths, orientations, metadata and damage.

Each says how it is to be seen, by another reader than ours: Pillow for what Pillow reads rightly, tifffile for TIFFs,
and the array that it was made of.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import tifffile
from PIL import Image, ImageCms

from tests.helpers.images import with_exif
from tests.shards.phones import TEN_BITS, deep_heic, forms, photograph, with_metadata
from tests.shards.specimens import (
    ALPHA,
    GREY,
    HEIGHT,
    RGB,
    TURNS,
    WIDTH,
    Specimen,
    as_rgb,
    encoded,
    exif,
    odd_exif,
    on_white,
    picture,
    pillows,
)


@cache
def zoo() -> tuple[Specimen, ...]:
    """All of them, the same in every call."""
    found = tuple(itertools.chain(_jpegs(), _pngs(), _tiffs(), _pages(), _others(), _phones(), _no_images()))
    assert len({specimen.name for specimen in found}) == len(found)
    return found


def _jpegs() -> Iterator[Specimen]:
    for colours, pixels in (("grey", GREY), ("rgb", RGB)):
        for sampling, progressive in itertools.product((0, 1, 2) if colours == "rgb" else (0,), (False, True)):
            clean = encoded(pixels, "JPEG", quality=95, subsampling=sampling, progressive=progressive)
            name = f"{colours}-{sampling}-{'progressive' if progressive else 'plain'}"
            yield Specimen(f"{name}.jpg", clean, pillows(clean), tolerance=1.5)
            for turn in range(2, 9):
                yield Specimen(
                    f"{name}-turned{turn}.jpg", with_exif(clean, exif(turn)), TURNS[turn](pillows(clean)), tolerance=1.5
                )
            yield Specimen(f"{name}-cut.jpg", clean[: len(clean) * 3 // 4], None, "damaged or cut image")
    clean = encoded(RGB, "JPEG", quality=95)
    for turn in (1, 3, 6):
        for name, blocks in odd_exif(turn).items():
            yield Specimen(
                f"odd-{name}-{turn}.jpg", with_exif(clean, *blocks), TURNS[turn](pillows(clean)), tolerance=1.5
            )
    blocks = {"short": b"Exif\0\0", "garbage": b"Exif\0\0" + bytes(range(99)), "empty": b""}
    for name, block in blocks.items():
        yield Specimen(f"odd-{name}.jpg", with_exif(clean, block), pillows(clean), tolerance=1.5)
    multi = clean[:2] + b"\xff\xe2" + struct.pack(">H", 40) + b"MPF\0II*\0" + b"\xff" * 30 + clean[2:]
    yield Specimen("odd-mpf.jpg", multi, pillows(clean), tolerance=1.5)
    cmyk = encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=97)
    yield Specimen("cmyk.jpg", cmyk, pillows(cmyk), tolerance=1.5)
    yield Specimen("cmyk-turned.jpg", with_exif(cmyk, exif(6)), TURNS[6](pillows(cmyk)), tolerance=1.5)
    yield Specimen("short.jpg", clean[:30], None, "damaged or cut image", headers_are_whole=False)
    yield Specimen("noise.jpg", clean[:700] + bytes(200), None, "damaged or cut image")


def chunk(kind: bytes, data: bytes, *, checksum: int | None = None) -> bytes:
    """A chunk of a PNG."""
    crc = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def with_chunks(png: bytes, *chunks: bytes, at_end: bool = False) -> bytes:
    """A PNG with further chunks, behind its header or before its end."""
    place = len(png) - 12 if at_end else 33
    return png[:place] + b"".join(chunks) + png[place:]


def deep_png(samples: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write in colour."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _pngs() -> Iterator[Specimen]:
    colour = Image.fromarray(RGB)
    palette = colour.quantize(64)
    yield Specimen("rgb.png", encoded(RGB, "PNG"), RGB)
    yield Specimen("grey.png", encoded(GREY, "PNG"), as_rgb(GREY))
    yield Specimen("bits.png", encoded(colour.convert("1"), "PNG"), np.asarray(colour.convert("1").convert("RGB")))
    yield Specimen("palette.png", encoded(palette, "PNG"), np.asarray(palette.convert("RGB")))
    yield Specimen("rgba.png", encoded(np.dstack([RGB, ALPHA]), "PNG"), on_white(RGB, ALPHA))
    yield Specimen("greyalpha.png", encoded(np.dstack([GREY, ALPHA]), "PNG"), on_white(GREY, ALPHA))
    deep = np.rint(picture() * 65535)
    for name, channels in {"grey": [0], "greyalpha": [0, 3], "rgb": [0, 1, 2], "rgba": [0, 1, 2, 3]}.items():
        colours = RGB if len(channels) > 2 else GREY
        seen = as_rgb(colours) if len(channels) % 2 else on_white(colours, ALPHA)
        yield Specimen(f"deep-{name}.png", deep_png(deep[..., channels]), seen)
    clean = encoded(RGB, "PNG")
    long_text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 * 2**20)))
    odd = {
        "longtext": (long_text, 1),
        "eXIf": (chunk(b"eXIf", exif(6)[6:]), 6),
        "badtext": (chunk(b"tEXt", b"a\0b", checksum=7), 1),
        "private": (chunk(b"prVt", bytes(99)), 1),
        "xmp": (chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'), 8),
        "rawprofile": (
            chunk(b"tEXt", b"Raw profile type exif\0\nexif\n      %d\n%s\n" % (len(exif(3)), exif(3).hex().encode())),
            3,
        ),
        "badprofile": (chunk(b"iCCP", b"name\0\0garbage"), 1),
        "oddexif": (chunk(b"eXIf", b"II*\0garbage"), 1),
        "badtime": (chunk(b"tIME", b"\1"), 1),
        "badphys": (chunk(b"pHYs", b""), 1),
    }
    for (name, (extra, turn)), at_end in itertools.product(odd.items(), (False, True)):
        if name == "badprofile" and at_end:
            continue
        yield Specimen(f"odd-{name}{'-end' * at_end}.png", with_chunks(clean, extra, at_end=at_end), TURNS[turn](RGB))
    frames = encoded(RGB, "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)])
    yield Specimen("animated.png", frames, RGB, is_animated=True)
    place = frames.index(b"fdAT") + 8
    yield Specimen("animated-damaged.png", frames[:place] + b"\xff" * 8 + frames[place + 8 :], RGB, is_animated=True)
    yield Specimen("cut.png", clean[: len(clean) * 2 // 3], None, "damaged or cut image")
    place = clean.index(b"IDAT") + 20
    flipped = clean[:place] + bytes([clean[place] ^ 255]) + clean[place + 1 :]
    yield Specimen("flipped.png", flipped, None, "damaged or cut image")
    yield Specimen("headless.png", clean[:8] + clean[33:], None, "damaged or cut image", headers_are_whole=False)


def numbers(kind: str, bits: int, channels: int) -> np.ndarray:
    """The picture as a TIFF may hold it, [H, W, channels]."""
    values = picture()[..., :channels]
    if kind == "float":
        return values.astype(f"f{bits // 8}")
    top = 2**bits - 1 if kind == "uint" else 2 ** (bits - 1) - 1
    whole = np.minimum(np.rint(values * top), top - 2**11 * (bits == 64))  # a float64 rounds the largest of 64 bits up
    return whole.astype(f"{'u' if kind == 'uint' else 'i'}{bits // 8}")


_UNKNOWN = "a kind of TIFF that is not supported"


def _tiffs() -> Iterator[Specimen]:
    """Sample formats x photometric x planes x packing x byte order, as tifffile writes and reads them."""
    kinds = [
        ("uint", 8),
        ("uint", 16),
        ("uint", 32),
        ("uint", 64),
        ("int", 8),
        ("int", 16),
        ("int", 32),
        ("float", 16),
        ("float", 32),
        ("float", 64),
    ]
    for (kind, bits), order, packing in itertools.product(kinds, "<>", (None, "zlib")):
        for photometric in ("minisblack", "miniswhite", "rgb", "rgba", "planes"):
            channels = {"rgb": 3, "rgba": 4, "planes": 3}.get(photometric, 1)
            data = numbers(kind, bits, channels)
            if photometric == "miniswhite":
                data = data.max() - data
            flat = (
                data[..., 0]
                if channels == 1
                else np.ascontiguousarray(data.transpose(2, 0, 1))
                if photometric == "planes"
                else data
            )
            stored = io.BytesIO()
            tifffile.imwrite(
                stored,
                flat,
                byteorder=order,
                compression=packing,
                metadata=None,
                photometric="rgb" if channels > 1 else photometric,
                planarconfig="separate" if photometric == "planes" else "contig" if channels > 1 else None,
                extrasamples=["unassalpha"] if channels == 4 else None,
            )
            np.testing.assert_array_equal(tifffile.imread(io.BytesIO(stored.getvalue())), flat)
            seen = on_white(RGB, ALPHA) if channels == 4 else RGB if channels == 3 else as_rgb(GREY)
            name = f"{kind}{bits}-{photometric}-{'le' if order == '<' else 'be'}-{packing or 'raw'}.tif"
            is_known = _is_known(kind, bits, photometric, order)
            yield Specimen(
                name,
                stored.getvalue(),
                seen if is_known else None,
                "" if is_known else _UNKNOWN,
                headers_are_whole=is_known,
            )
    layouts = {
        "tiles": {"tile": (16, 16)},
        "strips": {"rowsperstrip": 7},
        "big": {"bigtiff": True},
        "predicted": {"predictor": True, "compression": "zlib"},
    }
    for (name, layout), planes in itertools.product(layouts.items(), ("contig", "separate")):
        data, stored = numbers("uint", 16, 3), io.BytesIO()
        data = np.ascontiguousarray(data.transpose(2, 0, 1)) if planes == "separate" else data
        tifffile.imwrite(stored, data, photometric="rgb", planarconfig=planes, metadata=None, **layout)
        yield Specimen(f"{name}-{planes}.tif", stored.getvalue(), RGB)


def _is_known(kind: str, bits: int, photometric: str, order: str) -> bool:
    """What is read of these; the rest is listed, and none of it is seen wrongly."""
    if photometric in ("rgb", "rgba", "planes"):
        return kind == "uint" and bits <= 16
    if photometric == "miniswhite":
        return (kind == "uint" and (bits == 8 or (bits == 16 and order == "<"))) or (kind, bits) == ("float", 32)
    return (kind, bits) in {("uint", 8), ("uint", 16), ("int", 16), ("int", 32), ("float", 32)} or (
        kind,
        bits,
        order,
    ) == ("uint", 32, "<")


def pages(*entries: tuple[int, int, int, int], second: bytes = b"", data: bytes = b"", bits: int = 8) -> bytes:
    """A grey TIFF with further entries, (tag, type, count, value), and a second page."""
    data = data or GREY.tobytes()
    own = [
        (256, 3, 1, WIDTH),
        (257, 3, 1, HEIGHT),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 3, 1, HEIGHT),
        (279, 4, 1, len(data)),
        *entries,
    ]
    place = 8 + len(data)
    page = struct.pack("<H", len(own)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(own))
    end = struct.pack("<I", place + len(page) + 4 if second else 0)
    return b"II*\0" + struct.pack("<I", place) + data + page + end + second


def _pages() -> Iterator[Specimen]:
    seen = as_rgb(GREY)
    yield Specimen("page-plain.tif", pages(), seen)
    for turn in range(2, 9):
        yield Specimen(f"page-turned{turn}.tif", pages((274, 3, 1, turn)), TURNS[turn](seen))
    odd = {
        "text": (282, 2, 3, 0x3237),
        "xmp": (700, 3, 2, 0x10001),
        "float": (305, 11, 1, 0x3FC00000),
        "lost": (306, 2, 2**31, 99),
        "unknown": (65000, 99, 3, 1),
        "profile": (34675, 3, 2, 7),
        "private": (42112, 7, 4, 0),
    }
    for name, entry in odd.items():
        yield Specimen(f"page-{name}.tif", pages((274, 3, 1, 6), entry), TURNS[6](seen))
    second = struct.pack("<HHHII", 1, 259, 3, 1, 1) + bytes(4)
    for name, further in {"short": second, "garbage": b"\xff" * 40, "cut": b"\1"}.items():
        yield Specimen(f"page-second-{name}.tif", pages(second=further), seen, is_animated=True)
    whole = pages()
    yield Specimen("page-cut.tif", whole[:-30], None, "damaged or cut image", headers_are_whole=False)
    yield Specimen(
        "page-nowhere.tif", whole[:4] + b"\xff" * 4 + whole[8:], None, "damaged or cut image", headers_are_whole=False
    )
    colour = Image.fromarray(RGB)
    for mode in ("1", "P", "CMYK", "YCbCr"):
        payload = encoded(colour.quantize(64) if mode == "P" else colour.convert(mode), "TIFF")
        yield Specimen(f"pillow-{mode}.tif", payload, pillows(payload), tolerance=2)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    in_lab = ImageCms.profileToProfile(colour, srgb, lab, outputMode="LAB")
    yield Specimen("pillow-LAB.tif", encoded(in_lab, "TIFF"), RGB, tolerance=4)
    for packing in ("tiff_lzw", "packbits", "jpeg", "tiff_deflate"):
        yield Specimen(f"pillow-{packing}.tif", encoded(RGB, "TIFF", compression=packing), RGB, tolerance=4)
    values = np.rint(picture()[..., 0] * 4095).astype(int).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    yield Specimen("page-twelve.tif", pages(data=packed.astype(np.uint8).tobytes(), bits=12), seen)


def _others() -> Iterator[Specimen]:
    colour, palette = Image.fromarray(RGB), Image.fromarray(RGB).quantize(64)
    two = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}
    for name, options in {"lossless": {"lossless": True}, "lossy": {"quality": 95}}.items():
        payload = encoded(RGB, "WEBP", **options)
        seen = pillows(payload)
        yield Specimen(f"{name}.webp", payload, seen)
        for turn in range(2, 9):
            turned = encoded(RGB, "WEBP", exif=exif(turn), **options)
            yield Specimen(f"{name}-turned{turn}.webp", turned, TURNS[turn](seen))
        yield Specimen(f"{name}-odd.webp", encoded(RGB, "WEBP", exif=odd_exif(6)["text"][0], **options), TURNS[6](seen))
    alpha = encoded(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True)
    yield Specimen("alpha.webp", alpha, on_white(RGB, ALPHA))
    yield Specimen("animated.webp", encoded(RGB, "WEBP", lossless=True, **two), RGB, is_animated=True)
    yield Specimen("cut.webp", payload[: len(payload) // 2], None, "damaged or cut image", headers_are_whole=False)
    still = encoded(palette, "GIF")
    yield Specimen("still.gif", still, np.asarray(palette.convert("RGB")))
    moving = encoded(palette, "GIF", save_all=True, append_images=[Image.fromarray(255 - RGB).quantize(64)])
    yield Specimen("animated.gif", moving, np.asarray(palette.convert("RGB")), is_animated=True)
    yield Specimen("animated-cut.gif", moving[: len(still) + 30], np.asarray(palette.convert("RGB")), is_animated=True)
    yield Specimen("cut.gif", still[: len(still) // 2 + 200], None, "damaged or cut image")
    for mode in ("1", "L", "P", "RGB"):
        payload = encoded(palette if mode == "P" else colour.convert(mode), "BMP")
        yield Specimen(f"{mode}.bmp", payload, pillows(payload))
    yield Specimen("cut.bmp", payload[: len(payload) // 2], None, "damaged or cut image")
    header = f"{WIDTH} {HEIGHT}"
    yield Specimen("text.pgm", f"P2 {header} 255\n{' '.join(map(str, GREY.ravel()))}\n".encode(), as_rgb(GREY))
    yield Specimen("grey.pgm", f"P5 {header} 255\n".encode() + GREY.tobytes(), as_rgb(GREY))
    yield Specimen("rgb.ppm", f"P6 {header} 255\n".encode() + RGB.tobytes(), RGB)
    deep = np.rint(picture() * 65535).astype(">u2")
    yield Specimen("deep.pgm", f"P5 {header} 65535\n".encode() + deep[..., 0].tobytes(), as_rgb(GREY))
    yield Specimen("deep.ppm", f"P6 {header} 65535\n".encode() + deep[..., :3].tobytes(), RGB)
    bits = f"P4 {header}\n".encode() + np.packbits(GREY < 128, axis=1).tobytes()
    yield Specimen("bits.pbm", bits, as_rgb(255 * (GREY >= 128)))
    floats = picture()[::-1, :, 0].astype("<f4")
    yield Specimen("floats.ppm", f"Pf {header} -1.0\n".encode() + floats.tobytes(), as_rgb(GREY))
    yield Specimen("cut.ppm", f"P6 {header} 255\n".encode() + RGB.tobytes()[:99], None, "damaged or cut image")


def _phones() -> Iterator[Specimen]:
    for form, name in forms():
        known = {"tolerance": 4.0, "foreign": name}
        for boxes in TURNS:
            yield Specimen(f"boxes{boxes}.{form}", photograph(RGB, form, boxes=boxes), TURNS[boxes](RGB), **known)
        for boxes, says in itertools.product((1, 5, 6), (6, 8)):
            payload = photograph(RGB, form, boxes=boxes, says=says)
            yield Specimen(f"boxes{boxes}-exif{says}.{form}", payload, TURNS[boxes](RGB), **known)
        for kind in ("text", "float", "long", "nested", "bigendian", "lost", "unknown"):
            payload = with_metadata(RGB, form, exif=odd_exif(6)[kind][0])
            yield Specimen(f"odd-{kind}.{form}", payload, RGB, **known)
        payload = with_metadata(RGB, form, xmp=b'<x tiff:Orientation="6"/>')
        yield Specimen(f"odd-xmp.{form}", payload, RGB, **known)
        yield Specimen(f"grey.{form}", photograph(GREY, form, boxes=6), TURNS[6](as_rgb(GREY)), **known)
        alpha = photograph(np.dstack([RGB, ALPHA]), form, boxes=8, says=8)
        yield Specimen(f"alpha.{form}", alpha, TURNS[8](on_white(RGB, ALPHA)), **known)
        yield Specimen(f"cut.{form}", payload[: len(payload) - 99], None, headers_are_whole=False, foreign=name)
        if name == "AVIF":
            yield Specimen("deep10.avif", TEN_BITS, RGB, **known)
            continue
        for bits in (10, 12):
            deep = deep_heic(np.rint(picture()[..., :3] * 65535).astype(np.uint16), bits)
            yield Specimen(f"deep{bits}.heic", deep, RGB, **known)


def _no_images() -> Iterator[Specimen]:
    none = {
        "empty.png": (b"", "empty file"),
        "page.jpg": (b"<html>404</html>", "not an image"),
        "script.gif": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        "film.jpg": (b"\0\0\0\x18ftypisom" + bytes(99), "not an image"),
        "text.ppm": (b"P6 is a format", "damaged or cut image"),
        "zip.webp": (b"PK\3\4" + bytes(99), "not an image"),
        "phone.jpg": (b"\0\0\0\x1cftypheic" + bytes(99), None),
        "phone.png": (b"\0\0\0\x1cftypavif" + bytes(99), None),
        "film.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "format JPEG 2000 is not supported: convert it to PNG or JPEG first"),
        "x.jxl": (b"\xff\x0a\0\0", "format JPEG XL is not supported: convert it to PNG or JPEG first"),
        "bomb.png": (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(99)))
            + chunk(b"IEND", b""),
            "too many pixels",
        ),
    }
    for name, (payload, reason) in none.items():
        yield Specimen(name, payload, None, reason or "", headers_are_whole=False)
