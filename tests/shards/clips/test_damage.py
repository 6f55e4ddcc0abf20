"""Videos damaged at random: what comes of each is clips, or a reason why there are none."""

from __future__ import annotations

import io

import numpy as np
import pytest

from shards.cleaning.rules import Cleaning
from shards.clips.clip import ClipSettings
from shards.clips.cutting import clips_of_video
from shards.images.reading import ImageError
from tests.helpers.videos import CODECS, moving_square, tone, write_video

FILES = 8
"""Damaged files of each container; a run of 300 met nothing else either."""


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """A video that is cut, has wrong bytes anywhere or in its header, or a hole."""
    content, kind = bytearray(whole), rng.integers(4)
    if kind == 0:
        return bytes(content[: rng.integers(1, len(content))])
    if kind == 1:
        start = int(rng.integers(len(content)))
        content[start : start + 4000] = rng.bytes(min(4000, len(content) - start))
    else:
        last = len(content) if kind == 2 else min(600, len(content))
        for _ in range(rng.integers(1, 30)):
            content[rng.integers(last)] = rng.integers(256)
    return bytes(content)


@pytest.mark.parametrize("suffix", CODECS)
def test_damage_of_any_kind_ends_in_clips_or_in_a_reason(tmp_path, suffix):
    rng = np.random.default_rng(list(CODECS).index(suffix))
    sound = None if suffix == "gif" else tone(2.0)
    whole = write_video(
        tmp_path / f"a.{suffix}", [moving_square(number) for number in range(50)], sound=sound
    ).read_bytes()
    settings, check = ClipSettings(frame_rate=5, clip_seconds=1, sound_rate=8000), Cleaning(max_pixels=10**7).check_size
    for _ in range(FILES):
        content, notes = damaged(whole, rng), []
        try:
            for clip in clips_of_video(
                lambda content=content: io.BytesIO(content), settings, quality=80, check=check, note=notes.append
            ):
                assert 1 <= len(clip.frames) == len(clip.times) == len(clip.motion) <= 5
                assert (np.diff(clip.times) >= 0).all() and 0 <= clip.sound.num_samples <= 8000
        except ImageError as error:
            assert str(error)
