"""What can be told from an image's bytes without torch, and images as everybody expects them: upright, RGB, 8 bits.

`read_rgb` is how conversion, verification, training and evaluation read an image; what one of them reads, all do. What
a file says beside its pixels (EXIF, XMP, texts, further pages) is taken away before a library sees it, but for the
orientation and the colour profile: cameras and editors write what no library expects, around good pictures.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin, features

from shards.ground.errors import InputError, NotEnoughMemory
from shards.images import jpeg, orientation
from shards.images.formats import FOREIGN, can_read, format_of, needs
from shards.images.heif import bare_heif
from shards.images.names import IMAGE_FORMATS
from shards.images.png import bare_png
from shards.images.tiff import BITS, PHOTOMETRIC, SAMPLE_FORMAT, bare_tiff, silence_libtiff

MAX_PIXELS = 178_956_970
"""Pixels up to which an image is opened unless another limit is given: 512 MB as RGB."""

# Ours is the limit, looked at when a header is read: Pillow's own would hold against a larger --max-pixels.
Image.MAX_IMAGE_PIXELS = None
# Of 16-bit colours in planes, and of some alpha channels, Pillow's own unpacking makes noise.
TiffImagePlugin.READ_LIBTIFF = bool(features.check("libtiff"))
silence_libtiff()
warnings.filterwarnings("ignore", module=r"PIL\.")  # about damage, which we tell by its place

_DAMAGED = "damaged or cut image"
_UNKNOWN_TIFF = "a kind of TIFF that is not supported"
_BITS_PER_SAMPLE = 258
_ALPHA = ("LA", "PA", "La", "RGBa", "RGBA")
_ORIENTATION, _HAS_MORE, _WHITE_IS_ZERO, _UNSIGNED, _TOP = "orientation", "has more", "white is 0", "unsigned", "top"
"""What `opened` notes in an image's info."""


@dataclass(frozen=True)
class ImageFacts:
    """Format code (position in IMAGE_FORMATS) and size in pixels, from the header: as stored, not turned yet."""

    format: int
    width: int
    height: int


class ImageError(Exception):
    """Bytes that are no usable image; the message is the reason, short and without values, so it can be counted."""


def inspect(payload: bytes, *, decode: bool, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Read an image's header, and with `decode` all of its pixels.

    Raises:
        ImageError: empty, of no known format, cut, damaged, or of more pixels than `max_pixels`.
    """
    header = jpeg.read_header(payload)
    if header is None or not header.is_ordinary:
        with opened(payload, max_pixels=max_pixels) as image:
            found = facts(image)
            if decode:
                to_rgb(image)
            return found
    if max_pixels and header.width * header.height > max_pixels:
        raise ImageError("too many pixels")
    if decode:
        read_jpeg(payload, header)
    return ImageFacts(IMAGE_FORMATS.index("jpeg"), header.width, header.height)


def read_rgb(payload: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as it is to be seen: the first frame, upright, uint8 [H, W, 3].

    Raises:
        ImageError: as of `inspect`.
    """
    header = jpeg.read_header(payload)
    if header and header.is_ordinary:
        if max_pixels and header.width * header.height > max_pixels:
            raise ImageError("too many pixels")
        return np.ascontiguousarray(orientation.turned(read_jpeg(payload, header), header.orientation))
    with opened(bytes(payload), max_pixels=max_pixels) as image:
        return np.array(to_rgb(image))


def read_jpeg(
    payload: bytes | memoryview, header: jpeg.JpegHeader, reduction: int = 1, buffer: np.ndarray | None = None
) -> np.ndarray:
    """An ordinary JPEG as it is stored, not turned: uint8 [H, W, 3], sides divided by `reduction` and rounded up.

    Args:
        buffer: memory for the result.

    Raises:
        ImageError: damaged or cut.
    """
    try:
        return jpeg.decode(payload, header, reduction, buffer)
    except ValueError:
        pass
    with opened(header.bare(payload), max_pixels=0) as image:
        if image.size != (header.width, header.height):
            raise ImageError(_DAMAGED)
        whole = image.convert("RGB")
        size = -(-header.width // reduction), -(-header.height // reduction)
        return np.array(whole.resize(size, Image.Resampling.BOX) if reduction > 1 else whole)


@contextmanager
def opened(payload: bytes, *, max_pixels: int = MAX_PIXELS, foreign: bool = False) -> Iterator[Image.Image]:
    """An image whose header is read; whatever Pillow raises inside becomes an ImageError.

    Args:
        payload: its bytes.
        max_pixels: it is refused if it has more, before any of them is decoded; 0 is no limit.
        foreign: also open formats that shards do not hold, where a library for them is there.

    Raises:
        ImageError: as of `inspect`.
        NotEnoughMemory: as it says.
    """
    if not payload:
        raise ImageError("empty file")
    name = format_of(payload)
    if not name:
        raise ImageError("not an image")
    if name in FOREIGN and not (foreign and can_read(name)):
        raise ImageError(needs(name))
    size = (0, 0)
    try:
        with _open(payload, name) as image:
            size = image.size
            if max_pixels and image.width * image.height > max_pixels:
                raise ImageError("too many pixels")
            yield image
    except (ImageError, InputError):
        raise
    except MemoryError as error:
        raise NotEnoughMemory(
            f"not enough memory for an image of {size[0]} x {size[1]} pixels: give fewer --workers or "
            f"threads, free memory, or leave such images out with --max-pixels"
        ) from error
    except Exception as error:  # a decoder may raise anything, and it is this image's, not the command's
        raise ImageError(_DAMAGED) from error


def _open(payload: bytes, name: str) -> Image.Image:
    """An image by the one plugin for its format, without its metadata."""
    info: dict[str, object] = {}
    header = jpeg.read_header(payload) if name == "jpeg" else None
    if header:
        info, payload = {_ORIENTATION: header.orientation}, header.bare(payload)
    elif name == "png":
        payload, info[_ORIENTATION], info[_HAS_MORE] = bare_png(payload)
    elif name == "tiff":
        payload, info = _bare_tiff(payload)
    elif name in FOREIGN:
        payload = bare_heif(payload)
    plugin = {"HEIC": "HEIF"}.get(name, name.upper())
    try:
        # No other format is tried: Pillow starts Ghostscript for EPS, whatever the file's name.
        image = Image.open(io.BytesIO(payload), formats=(plugin,))
    except Image.UnidentifiedImageError as error:
        if header and header.is_ordinary:  # then the other decoder may read it, which takes no tables amiss
            decoded = Image.fromarray(jpeg.decode(payload, header))
            decoded.format = "JPEG"
            decoded.info.update(info)
            return decoded
        raise ImageError(_UNKNOWN_TIFF if name == "tiff" else _DAMAGED) from error
    image.info.update(info)
    if name == "tiff":
        _mend_tiff(image)
    elif name == "gif":
        image.info[_HAS_MORE] = _gif_goes_on(payload)
    return image


def _bare_tiff(payload: bytes) -> tuple[bytes, dict[str, object]]:
    page = bare_tiff(payload)
    if page is None:
        raise ImageError(_DAMAGED)
    bits, kind = page.numbers.get(BITS, 1), page.numbers.get(SAMPLE_FORMAT, 1)
    if kind == 2 and bits == 8:  # Pillow takes them for numbers from 0 to 255
        raise ImageError(_UNKNOWN_TIFF)
    return page.payload, {
        _ORIENTATION: page.orientation,
        _HAS_MORE: page.has_more,
        _UNSIGNED: kind == 1,
        _WHITE_IS_ZERO: page.numbers.get(PHOTOMETRIC, 0) == 0 and bits > 8,
        _TOP: 4095.0 if bits == 12 else 32767.0 if kind == 2 and bits == 16 else 65535.0,
    }


def _mend_tiff(image: ImageFile.ImageFile) -> None:
    """libtiff gives numbers in the order of this machine; Pillow takes those with signs, and floats, for the file's."""
    [tile] = image.tile
    if tile.codec_name != "libtiff" or not isinstance(tile.args, tuple):
        return
    fixed = {
        "I;16S": "I;16NS",
        "I;16BS": "I;16NS",
        "I;32S": "I;32NS",
        "I;32BS": "I;32NS",
        "F;32F": "F;32NF",
        "F;32BF": "F;32NF",
    }.get(tile.args[0])
    if fixed:
        image.tile = [tile._replace(args=(fixed, *tile.args[1:]))]


def _gif_goes_on(payload: bytes) -> bool:
    """Whether a GIF has a second frame, be it a damaged one; looking for it would spoil an image that is in use."""
    try:
        with Image.open(io.BytesIO(payload), formats=("GIF",)) as image:
            return bool(getattr(image, "is_animated", True))
    except Exception:
        return True


def facts(image: Image.Image) -> ImageFacts:
    """Format and size of an open image; of a foreign one those of the JPEG that it becomes."""
    name = (image.format or "").lower()
    return ImageFacts(IMAGE_FORMATS.index(name if name in IMAGE_FORMATS else "jpeg"), image.width, image.height)


def jpeg_facts(payload: bytes) -> ImageFacts | None:
    """The same of an ordinary JPEG, much faster; None for what is none, or is damaged."""
    header = jpeg.read_header(payload)
    if header is None or not header.is_ordinary:
        return None
    return ImageFacts(IMAGE_FORMATS.index("jpeg"), header.width, header.height)


def is_animated(image: Image.Image) -> bool:
    """Whether it has further frames or pages; those that a camera puts behind a JPEG do not count."""
    return bool(image.info.get(_HAS_MORE, False)) or (image.format != "JPEG" and getattr(image, "n_frames", 1) > 1)


def orientation_of(image: Image.Image) -> int:
    """How an image is to be turned, 1 to 8."""
    said = image.info.get(_ORIENTATION)
    if said is not None:
        return int(said)
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    return orientation.first_of([exif] if isinstance(exif, bytes) else [], xmp if isinstance(xmp, bytes) else b"")


def profile_of(image: Image.Image) -> bytes | None:
    """Its colour profile."""
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) and profile else None


def is_plain(image: Image.Image) -> bool:
    """Whether it is upright, a single frame, grey or RGB of 8 bits: what every decoder shows alike.

    Args:
        image: opened, and not decoded yet: what it is decoded to has 8 bits in any case.
    """
    if not isinstance(image, ImageFile.ImageFile):  # a JPEG that Pillow does not read
        return False
    return (
        image.mode in ("L", "RGB")
        and "transparency" not in image.info
        and not _is_deep(image)
        and image.format not in ("AVIF", "HEIF")
        and not is_animated(image)
        and orientation_of(image) == 1
    )


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether a file has more than 8 bits a channel, of which Pillow keeps 8 where it has three channels."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
    # What a decoder is told: of a 16-bit PNG "RGB;16B", of a PPM its highest value.
    how = [tile[3] for tile in image.tile]
    if image.format == "PPM":
        return any(isinstance(arguments, tuple) and arguments[1] > 255 for arguments in how)
    return image.format == "PNG" and any(isinstance(arguments, str) and ";16" in arguments for arguments in how)


def to_rgb(image: Image.Image, *, srgb: bool = False) -> Image.Image:
    """The first frame, upright, RGB of 8 bits: more bits scaled down, palettes resolved, what is transparent on white.

    Args:
        image: any mode.
        srgb: convert from the embedded colour profile.
    """
    profile, turn = profile_of(image) if srgb else None, orientation_of(image)
    image.load()
    if has_deep_mode(image):
        image = Image.fromarray(np.rint(scaled(image, 255)).astype(np.uint8))
    elif image.mode == "LAB":
        image, profile = _from_lab(image), None
    image = _on_white(image)
    return upright((from_profile(image, profile) if profile else image).convert("RGB"), turn)


def upright_of(payload: bytes, image: Image.Image, *, srgb: bool = False) -> Image.Image:
    """`to_rgb` of an open image, of an ordinary JPEG by the decoder that `read_rgb` prefers.

    Raises:
        ImageError: damaged or cut.
    """
    header = jpeg.read_header(payload) if image.format == "JPEG" else None
    profile = profile_of(image) if srgb else None
    if header is None or not header.is_ordinary or (profile and image.mode == "L"):
        return to_rgb(image, srgb=srgb)
    seen = upright(Image.fromarray(read_jpeg(payload, header)), header.orientation)
    return from_profile(seen, profile).convert("RGB") if profile else seen


def upright(image: Image.Image, turn: int) -> Image.Image:
    """An image turned as its orientation says; no metadata are looked at, or written."""
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(turn)
    return image if method is None else image.transpose(method)


def has_deep_mode(image: Image.Image) -> bool:
    """Whether its pixels are whole numbers of 16 or 32 bits, or floats; Pillow clips those where it converts them."""
    return image.mode.startswith("I") or image.mode == "F"


def scaled(image: Image.Image, top: int) -> np.ndarray:
    """Pixels of an image of `has_deep_mode` as numbers from 0 to `top`, float32; not turned.

    Whole numbers are taken to go up to 65535 (in a TIFF of 12 bits to 4095, of 16 with a sign to 32767), floats up to
    the first of 1, 255 and 65535 that none exceeds. Images with numbers beyond that, or below 0, are stretched from
    their lowest to their highest.
    """
    values = np.asarray(image)
    if image.mode == "I" and image.info.get(_UNSIGNED):
        values = values.view(np.uint32)  # Pillow has no such mode, but keeps the bits
    values = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    limits = (1.0, 255.0, 65535.0) if image.mode == "F" else (float(image.info.get(_TOP, 65535.0)),)
    limit = next((limit for limit in limits if high <= limit), None)
    if low < 0 or limit is None:
        values, limit = values - low, max(high - low, 1.0)
    values *= top / limit
    return top - values if image.info.get(_WHITE_IS_ZERO) else values


def _on_white(image: Image.Image) -> Image.Image:
    """Palettes resolved, and what is transparent laid on white, in the colour space that the image has."""
    if image.mode not in _ALPHA and "transparency" not in image.info:
        return image.convert("RGB") if image.mode == "P" else image
    grey = image.mode in ("1", "L", "LA", "La")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB").getchannel("R") if grey else image.convert("RGB")


def _from_lab(image: Image.Image) -> Image.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image


def from_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """An image's colours in sRGB; as they are if the profile is damaged, or of another colour space."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    except Exception:  # what a profile's bytes can make a library raise, too
        return image
