"""Clips in which one of two shapes sounds: what is heard tells which, and where it is can be seen alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shards.clips.clip import ClipSettings
from shards.conversion.convert import Options, convert
from tests.helpers.videos import tone, write_video

RATE, FRAMES, SIDE, SHAPE = 8000, 4, 48, 16
COLOURS = ((230, 60, 50), (60, 200, 70), (70, 90, 240), (230, 210, 60), (210, 80, 220), (70, 210, 220))
"""A shape of each colour has a pitch of its own."""
_CHECKED = np.indices((SHAPE, SHAPE)).sum(0) // 2 % 2
"""Of two shades: what there is to see of a shape is not at its edges alone."""


def pitch(kind: int) -> float:
    """Of the tone of shapes of a colour, in Hz."""
    return 400.0 * 1.45**kind


def sounding_clips(folder: Path, counts: dict[str, int]) -> Path:
    """Folders of shards `shards/PART` by part, of as many clips of a second: two shapes of different colours, one of
    which moves and sounds; where it is, is in the clip's json as `box`.
    """
    for place, (part, count) in enumerate(counts.items()):
        draws, rows = np.random.default_rng(place), []
        for number in range(count):
            kinds = draws.permutation(len(COLOURS))[:2]
            frames, boxes = _frames(kinds, draws)
            path = folder / part / f"{number:04d}.mkv"
            write_video(path, frames, rate=FRAMES, sound=tone(1.0, RATE, pitch(kinds[0])), sound_rate=RATE)
            rows.append({"path": path.name, "class": str(kinds[0]), "box": boxes})
        listed = folder / part / "list.jsonl"
        listed.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        clips = ClipSettings(frame_rate=FRAMES, sound_rate=RATE)
        options = Options("clips", labels="column:class", samples_per_shard=100, clips=clips)
        convert(listed, folder / "shards" / part, options)
    return folder / "shards"


def half_silent_clips(folder: Path, count: int) -> Path:
    """A shard folder of clips of half a second; every second one, from that of number 1, has sound."""
    for number in range(count):
        pixels = np.full((SIDE, SIDE, 3), 10 * number, np.uint8)
        sound = tone(0.5, RATE, pitch(0)) if number % 2 else None
        write_video(
            folder / "in" / f"{number:04d}.mkv", [pixels] * FRAMES, rate=2 * FRAMES, sound=sound, sound_rate=RATE
        )
    clips = ClipSettings(frame_rate=2 * FRAMES, sound_rate=RATE)
    convert(folder / "in", folder / "clips", Options("clips", samples_per_shard=100, clips=clips))
    return folder / "clips"


def _frames(kinds: np.ndarray, draws: np.random.Generator) -> tuple[list[np.ndarray], list[list[float]]]:
    """Frames, uint8 [H, W, 3], and where the first shape is in each, as shares: left, top, width, height."""
    room = SIDE - SHAPE
    while True:  # apart, wherever the first one goes
        starts = draws.integers(0, room + 1, (2, 2))
        ways = [starts[0] + step * np.array([1, 0]) for step in range(FRAMES)]
        if starts[0, 0] + FRAMES <= room and all(np.abs(one - starts[1]).max() > SHAPE for one in ways):
            break
    frames, boxes = [], []
    for left, top in ways:
        pixels = np.full((SIDE, SIDE, 3), 110, np.uint8) + draws.integers(0, 20, (SIDE, SIDE, 1), np.uint8)
        for (x, y), kind in (((left, top), kinds[0]), (starts[1], kinds[1])):
            pixels[y : y + SHAPE, x : x + SHAPE] = np.array(COLOURS[kind]) // (1 + _CHECKED[..., None])
        frames.append(pixels)
        boxes.append([float(one) / SIDE for one in (left, top, SHAPE, SHAPE)])
    return frames, boxes
