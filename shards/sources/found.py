"""What sources find: files that become samples, files that are left out and why, and what is read of them."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field

from shards.stores.folders import BROKEN, LINK

TORN = "a torn tar: what follows in it is lost"
SCATTERED = "a tar that holds members of a sample too far apart"
NAMED = {
    TORN: "restore them, then add what they held with --update, or index again",
    SCATTERED: "pack them again in the order of the names (tar --sort=name), then add them with --update",
    LINK: "links to folders are not followed; move their folders there, or convert what they lead to",
    BROKEN: "bring back what they lead to, then add it with --update, or index again",
}
"""Reasons that may cost many images at once, with what to do about them; a warning then names the files."""

_BESIDE = {"__MACOSX": "what macOS packs beside a file", ".ipynb_checkpoints": "a notebook's copy of a file"}
"""Folders that programs make beside the user's, by name."""

HIDDEN = "in a hidden folder, which is no class"


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


def why_beside(path: str) -> str:
    """Why what lies at a path is a program's and not the user's; empty if it is the user's."""
    return next((reason for folder, reason in _BESIDE.items() if f"/{folder}/" in f"/{path}"), "")


def first_folder(path: str) -> str:
    """`./cat/old/1.png` to `cat`; empty for what lies in no folder, or outside of the source."""
    folder, slash, _ = posixpath.normpath(path).partition("/")
    return folder if slash and folder != ".." else ""
