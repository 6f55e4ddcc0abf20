"""Writes clips to a shard: KEY.000.jpg, KEY.001.jpg ... KEY.flac and KEY.json, indexed on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, BinaryIO

import xxhash

from shards.clips.clip import Clip
from shards.format.clip_index import columns_of
from shards.format.json_text import json_text
from shards.format.shard_index import ShardIndex
from shards.format.writer import ShardWriter
from shards.images.names import IMAGE_FORMATS
from shards.images.reading import ImageFacts

OWN_FACTS = ("source", "clip", "start", "times", "motion", "sound")
"""What the json of a clip says by itself."""

_JPEG = IMAGE_FORMATS.index("jpeg")


class ClipWriter(ShardWriter):
    """Writes clips to an open file one after the other. The image that the index names is the frame in the middle."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._clips: list[tuple[float | int, ...]] = []
        self._frames: list[tuple[float | int, ...]] = []

    def add_clip(self, key: str, clip: Clip, facts: dict[str, Any], label: int) -> None:
        """Write a clip.

        Args:
            key: its WebDataset key.
            clip: what is stored.
            facts: become its json, with its times and motion.
            label: class number, which becomes a member `cls`; -1 for none.
        """
        names = frame_names(len(clip.frames))
        sound = clip.sound
        facts = {
            **facts,
            "clip": clip.number,
            "start": round(clip.start, 6),
            "times": [round(time, 6) for time in clip.times],
            "motion": [round(change, 3) for change in clip.motion],
        }
        members = dict(zip(names, clip.frames, strict=True))
        if sound.num_samples:
            facts["sound"] = {"rate": sound.rate, "start": round(sound.start, 6), "samples": sound.num_samples}
            members["flac"] = sound.flac
        members["json"] = json_text(facts).encode()
        shown = ImageFacts(_JPEG, clip.width, clip.height)
        spans = self.add(key, members, names[len(names) // 2], shown, label)
        heard = (*spans["flac"], xxhash.xxh3_64_intdigest(sound.flac)) if sound.num_samples else (0, 0, 0)
        for name, payload, time, change in zip(names, clip.frames, clip.times, clip.motion, strict=True):
            self._frames.append((*spans[name], xxhash.xxh3_64_intdigest(payload), time, change))
        self._clips.append((clip.start, len(self._frames), *heard, sound.rate, sound.start, sound.num_samples))

    def finish(self) -> tuple[ShardIndex, str]:
        """Write the end of the tar; see `ShardWriter`."""
        index, checksum = super().finish()
        return replace(index, clips=columns_of(self._clips, self._frames)), checksum


def frame_names(count: int) -> list[str]:
    """Suffixes of the frames of a clip, which sort as they follow each other."""
    digits = max(3, len(str(count - 1)))
    return [f"{number:0{digits}d}.jpg" for number in range(count)]
