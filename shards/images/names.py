"""Which files are images, as far as names say: suffixes of images, of cameras' raw files, and of everything else."""

from __future__ import annotations

from collections.abc import Callable

from shards.images.formats import HEAD_BYTES, format_of

IMAGE_FORMATS: tuple[str, ...] = ("jpeg", "png", "webp", "bmp", "tiff", "gif", "ppm")
"""Formats by their code in the index. Append only: positions are stored."""

STORED_SUFFIXES: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")
"""Suffixes that an image keeps when it is stored; with another one it gets that of its format."""

IMAGE_SUFFIXES: tuple[str, ...] = (
    *STORED_SUFFIXES,
    "jpe",
    "jfif",
    "apng",
    "dib",
    "pgm",
    "pbm",
    "pnm",
    "heic",
    "heif",
    "hif",
    "avif",
    "jp2",
    "j2k",
    "jxl",
)
"""Member and file suffixes that count as images. The content decides which format they are, and whether it is known."""

NO_IMAGE = "not an image file"
"""Why most files are left out that are."""

RAW = "a camera's raw file: develop it to JPEG or TIFF first"
_RAW_SUFFIXES = frozenset(
    {
        "3fr",
        "arw",
        "cr2",
        "cr3",
        "crw",
        "dcr",
        "dng",
        "erf",
        "iiq",
        "kdc",
        "mef",
        "mrw",
        "nef",
        "nrw",
        "orf",
        "pef",
        "raf",
        "raw",
        "rw2",
        "sr2",
        "srf",
        "srw",
    }
)
"""Many begin as a TIFF does, with a thumbnail for its picture."""

VIDEO = "a video: convert those with --clips"
VIDEO_SUFFIXES = frozenset(
    ["mp4", "m4v", "mkv", "webm", "avi", "mov", "ogv", "mpg", "mpeg", "wmv", "flv", "3gp", "m2ts", "mts"]
)
"""GIFs are images as well."""

_OTHER_SUFFIXES = frozenset(
    {
        "txt",
        "text",
        "md",
        "rst",
        "log",
        "json",
        "jsonl",
        "ndjson",
        "csv",
        "tsv",
        "xml",
        "yaml",
        "yml",
        "toml",
        "ini",
        "cfg",
        "cls",
        "caption",
        "py",
        "sh",
        "ipynb",
        "js",
        "css",
        "doc",
        "docx",
        "xls",
        "xlsx",
        "ppt",
        "pptx",
        "pdf",
        "eps",
        "ps",
        "ai",
        "svg",
        "psd",
        "ico",
        "zip",
        "tar",
        "gz",
        "tgz",
        "bz2",
        "xz",
        "zst",
        "7z",
        "rar",
        "parquet",
        "arrow",
        "feather",
        "npy",
        "npz",
        "pkl",
        "pickle",
        "pt",
        "pth",
        "ckpt",
        "safetensors",
        "bin",
        "h5",
        "hdf5",
        "mat",
        "db",
        "sqlite",
        "lmdb",
        "idx",
        "index",
        "mp3",
        "wav",
        "flac",
        "ogg",
        "m4a",
        "aac",
        "exe",
        "dll",
        "so",
        "md5",
        "sha256",
        "lock",
        "tmp",
    }
)
"""What files with these suffixes are is not looked at: a caption beside every image would double the reading."""


def suffix_of(name: str) -> str:
    """The suffix of a name in lower case: `png` for `a.b.PNG`."""
    return name.rpartition(".")[2].lower()


def is_image(name: str) -> bool:
    """Whether a name is that of an image."""
    return suffix_of(name) in IMAGE_SUFFIXES


def why_no_image(name: str, begin: Callable[[int], bytes] | None = None) -> str:
    """Why a file is not an image, as far as can be told before it is read; empty if it may be one.

    Args:
        name: its suffix says what most files are.
        begin: reads the first n bytes of it, which show what other files are. None if that costs a request: then they
            may be images, and reading them will tell.
    """
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in _RAW_SUFFIXES:
        return RAW
    if suffix in VIDEO_SUFFIXES:
        return VIDEO
    if suffix in _OTHER_SUFFIXES:
        return NO_IMAGE
    try:
        return "" if begin is None or format_of(begin(HEAD_BYTES)) else NO_IMAGE
    except OSError:  # reading it will say why
        return ""
