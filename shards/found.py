"""What sources find: files that become samples, files that are left out and why, and what is read of them."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field

from shards.manifest import IMAGE_SUFFIXES

NO_IMAGE = "not an image file"
"""Why most files are left out that are."""


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


def first_folder(path: str) -> str:
    """`./cat/old/1.png` to `cat`; empty for what lies in no folder, or outside of the source."""
    folder, slash, _ = posixpath.normpath(path).partition("/")
    return folder if slash and folder != ".." else ""
