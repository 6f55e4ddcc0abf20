from __future__ import annotations

import pytest

from shards.ground.errors import InputError
from shards.sources.clip_source import open_clip_source
from tests.helpers.conversions import write


def test_videos_and_pairs_are_found_once_each_and_everything_else_is_accounted_for(tmp_path):
    write(
        tmp_path,
        {
            "a.mp4": b"video",
            "a.png": b"picture",
            "a.wav": b"sound",
            "b.jpg": b"1",
            "b.JPEG": b"22",
            "b.ogg": b"333",
            "b.opus": b"4444",
            "c.gif": b"moves",
            "c.srt": b"subtitles",
            "deep/c.gif": b"speaks",
            "deep/c.flac": b"1",
            "deep/d.mp3": b"1",
            "e.png": b"1",
            "e.mkv.part": b"1",
        },
    )
    source = open_clip_source(tmp_path)
    found = list(source.list())
    taken = {one.key: (source.name(one.place), one.size, source.is_pair(one.place)) for one in found if one.key}
    assert taken == {
        "a": ("a.mp4", 5, False),
        "a~2": ("a.png", 12, True),
        "b": ("b.JPEG", 5, True),
        "b~2": ("b.jpg", 4, True),
        "c": ("c.gif", 5, False),
        "deep/c": ("deep/c.gif", 7, True),
    }
    left = {source.name(one.place): one.reason for one in found if not one.key}
    assert set(left) == {"b.opus", "c.srt", "deep/d.mp3", "e.png", "e.mkv.part"}
    assert left["b.opus"] == "a second sound of an image" and left["deep/d.mp3"].startswith("a sound without")
    [pair] = [one.place for one in found if one.key == "deep/c"]
    with source.open(pair) as image, source.open_sound(pair) as sound:
        assert (image.read(), sound.read()) == (b"speaks", b"1")


def test_only_folders_and_lists_hold_clips(tmp_path):
    write(tmp_path, {"a.zip": b"PK"})
    with pytest.raises(InputError, match="unpack archives first"):
        open_clip_source(tmp_path / "a.zip")
    with pytest.raises(InputError, match="no such folder or file"):
        open_clip_source(tmp_path / "b")
