"""What sources find: files that become samples, files that are left out and why, and what is read of them."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field

from shards.format.manifest import IMAGE_SUFFIXES
from shards.images.formats import HEAD_BYTES, format_of

NO_IMAGE = "not an image file"
"""Why most files are left out that are."""

TORN = "a torn tar: what follows in it is lost"
LINK, BROKEN = "a link to a folder", "a link that leads nowhere"
NAMED = {TORN: "restore them, then add what they held with --update, or index again",
         LINK: "links to folders are not followed; move their folders there, or convert what they lead to",
         BROKEN: "bring back what they lead to, then add it with --update, or index again"}
"""Reasons that may cost many images at once, so that whoever converts is told by name, and what to do."""

_BESIDE = {"__MACOSX": "what macOS packs beside a file", ".ipynb_checkpoints": "a notebook's copy of a file"}
"""Folders that programs make beside the user's, by name."""

HIDDEN = "in a hidden folder, which is no class"

RAW = "a camera's raw file: develop it to JPEG or TIFF first"
_RAW_SUFFIXES = frozenset({
    "3fr", "arw", "cr2", "cr3", "crw", "dcr", "dng", "erf", "iiq", "kdc", "mef", "mrw", "nef", "nrw", "orf", "pef",
    "raf", "raw", "rw2", "sr2", "srf", "srw",
})
"""Many begin as a TIFF does, with a thumbnail for its picture."""

_OTHER_SUFFIXES = frozenset({
    "txt", "text", "md", "rst", "log", "json", "jsonl", "ndjson", "csv", "tsv", "xml", "yaml", "yml", "toml", "ini",
    "cfg", "cls", "caption", "py", "sh", "ipynb", "js", "css", "doc", "docx", "xls", "xlsx", "ppt", "pptx", "pdf",
    "eps", "ps", "ai", "svg", "psd", "ico", "zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar", "parquet",
    "arrow", "feather", "npy", "npz", "pkl", "pickle", "pt", "pth", "ckpt", "safetensors", "bin", "h5", "hdf5", "mat",
    "db", "sqlite", "lmdb", "idx", "index", "mp3", "wav", "flac", "ogg", "m4a", "aac", "mp4", "m4v", "mov", "avi",
    "mkv", "webm", "mpg", "mpeg", "wmv", "exe", "dll", "so", "md5", "sha256", "lock", "tmp",
})
"""What files with these suffixes are is not looked at: a caption beside every image would double the reading."""


@dataclass(frozen=True)
class Found:
    """A file.

    Attributes:
        place: what `read` needs to find it.
        key: of its sample; empty for what is left out.
        size: in bytes, -1 where it is not known.
        label: its class, where the source names one.
        folder: the first folder below the source that it lies in; empty for none.
        reason: why it is left out. Reasons are counted, so they name no values.
    """

    place: str
    key: str
    size: int
    label: str = ""
    folder: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Content:
    """The bytes of an image, its suffix, and other members of its sample (json, txt ...) by suffix."""

    payload: bytes
    suffix: str
    others: dict[str, bytes] = field(default_factory=dict)


def left_out(place: str, reason: str) -> Found:
    """A file that becomes no sample."""
    return Found(place, "", 0, reason=reason)


def suffix_of(name: str) -> str:
    """`a.b.PNG` to `png`."""
    return name.rpartition(".")[2].lower()


def is_image(name: str) -> bool:
    """Whether a name is that of an image."""
    return suffix_of(name) in IMAGE_SUFFIXES


def why_no_image(name: str, begin: Callable[[int], bytes] | None = None) -> str:
    """Why a file is no image, as far as can be told before it is read; empty if it may be one.

    Args:
        name: its suffix says what most files are.
        begin: reads so many of its first bytes, which say what the others are. None if that costs a request: then
            the others may be images, and reading them will tell.
    """
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in _RAW_SUFFIXES:
        return RAW
    if suffix in _OTHER_SUFFIXES:
        return NO_IMAGE
    try:
        return "" if begin is None or format_of(begin(HEAD_BYTES)) else NO_IMAGE
    except OSError:  # reading it will say why
        return ""


def why_beside(path: str) -> str:
    """Why what lies at a path is a program's and not the user's; empty if it is the user's."""
    return next((reason for folder, reason in _BESIDE.items() if f"/{folder}/" in f"/{path}"), "")


def first_folder(path: str) -> str:
    """`./cat/old/1.png` to `cat`; empty for what lies in no folder, or outside of the source."""
    folder, slash, _ = posixpath.normpath(path).partition("/")
    return folder if slash and folder != ".." else ""
