"""What `shards verify` checks of clips, besides the frames in their middles, which it checks as it does images."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from shards.clips.sound import from_flac
from shards.format.clip_index import ClipColumns
from shards.format.shard_index import ShardIndex
from shards.format.tar import TarSample
from shards.ground.open_file import OpenFile
from shards.images.reading import ImageError, inspect


def clip_problems(stored: OpenFile, index: ShardIndex, clips: ClipColumns, decode: bool) -> Iterator[tuple[str, str]]:
    """Frames and sounds that are not as the index says: key of the clip, and what is wrong.

    Raises:
        InputError: sounds are to be decoded, and PyAV is not installed.
    """
    for row in range(len(index)):
        size = index.width.item(row), index.height.item(row)
        for number, frame in enumerate(clips.frames(row)):
            payload = stored.read(clips.offset.item(frame), clips.size.item(frame))
            if xxhash.xxh3_64_intdigest(payload) != clips.checksum.item(frame):
                yield index.key(row), f"bytes of frame {number} differ from the index"
            elif decode and (what := _wrong_frame(payload, size)):
                yield index.key(row), f"frame {number}: {what}"
        if clips.sound_size.item(row):
            payload = stored.read(clips.sound_offset.item(row), clips.sound_size.item(row))
            if xxhash.xxh3_64_intdigest(payload) != clips.sound_checksum.item(row):
                yield index.key(row), "bytes of the sound differ from the index"
            elif decode and (what := _wrong_sound(payload, clips, row)):
                yield index.key(row), what


def leads_to_all(sample: TarSample, clips: ClipColumns, row: int) -> bool:
    """Whether the headers of a tar lead to all frames and to the sound of a clip."""
    spans = {(clips.offset.item(frame), clips.size.item(frame)) for frame in clips.frames(row)}
    if clips.sound_size.item(row):
        spans.add((clips.sound_offset.item(row), clips.sound_size.item(row)))
    return spans <= set(sample.members.values())


def _wrong_frame(payload: bytes, size: tuple[int, int]) -> str:
    try:
        found = inspect(payload, decode=True, max_pixels=size[0] * size[1])
    except ImageError as error:
        return str(error)
    said = f"is {found.width} x {found.height} pixels, the index says {size[0]} x {size[1]}"
    return "" if (found.width, found.height) == size else said


def _wrong_sound(payload: bytes, clips: ClipColumns, row: int) -> str:
    try:
        samples, rate = from_flac(payload)
    except ImageError as error:
        return str(error)
    said = clips.sound_samples.item(row), clips.sound_rate.item(row)
    found = f"its sound has {len(samples)} samples at {rate} Hz, the index says {said[0]} at {said[1]}"
    return "" if (len(samples), rate) == said else found
