"""What the index of a shard knows of its clips, and where in the tar their members are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from shards.format.clip_index import ClipColumns
from shards.format.shard_index import ShardIndex


class ClipFacts(NamedTuple):
    """What the index knows of a clip.

    Attributes:
        start: seconds from the first frame of its video.
        times: seconds from the clip's start to each frame, float32 [F].
        motion: mean absolute change of luma (0 to 255) from the frame before, float16 [F].
        sound_rate: samples of its sound per second; 0 for no sound.
        sound_start: seconds from the clip's start to the first sample.
        sound_samples: how many there are.
    """

    start: float
    times: np.ndarray
    motion: np.ndarray
    sound_rate: int
    sound_start: float
    sound_samples: int


def microseconds(times: np.ndarray) -> np.ndarray:
    """Times in seconds to the nearest microsecond, int64."""
    return np.rint(times.astype(np.float64) * 1e6).astype(np.int64)


class Place(NamedTuple):
    """Where the bytes of a member are in its tar: offset, size, and their xxh3-64."""

    start: int
    size: int
    checksum: int


def facts_of(clips: ClipColumns, row: int) -> ClipFacts:
    """What is known of one clip."""
    frames = slice(clips.frames(row).start, clips.frames(row).stop)
    sound = clips.sound_rate.item(row), clips.sound_start.item(row), clips.sound_samples.item(row)
    return ClipFacts(clips.start.item(row), clips.time[frames], clips.motion[frames], *sound)


def place_of_image(index: ShardIndex, row: int, frame: Callable[[int], int] | None) -> Place:
    """Where the image of a sample is; of a clip the frame that `frame` names when it is told how many there are, or the
    one in the middle.
    """
    if frame is None or (clips := index.clips) is None:
        return Place(index.offset.item(row), index.size.item(row), index.checksum.item(row))
    frames = clips.frames(row)
    chosen = frames[frame(len(frames))]
    return Place(clips.offset.item(chosen), clips.size.item(chosen), clips.checksum.item(chosen))


def place_of_sound(clips: ClipColumns, row: int) -> Place:
    """Where the FLAC file of a clip is; of size 0 for no sound."""
    return Place(clips.sound_offset.item(row), clips.sound_size.item(row), clips.sound_checksum.item(row))
