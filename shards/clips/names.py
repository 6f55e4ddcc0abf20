"""Which files hold moving pictures, or sound, as far as names say."""

from __future__ import annotations

from shards.images.names import VIDEO_SUFFIXES, suffix_of

_SOUND = frozenset(["ogg", "oga", "opus", "wav", "flac", "mp3", "m4a", "aac", "aif", "aiff", "wma"])

NO_CLIP = "no video, and no image with a sound of its name beside it"
"""Why most files are left out that are."""


def is_video(name: str) -> bool:
    """Whether a name is that of a video; GIFs are."""
    return suffix_of(name) in VIDEO_SUFFIXES or suffix_of(name) == "gif"


def is_sound(name: str) -> bool:
    """Whether a name is that of a sound."""
    return suffix_of(name) in _SOUND
