"""`shards info`: what a shard folder holds, in words (and as a page, see page.py).

Indexes are read one after the other and only counted, so a billion samples take the memory of thousands.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shards.format.clip_index import ClipColumns
from shards.format.manifest import Manifest
from shards.format.shard_index import ShardIndex
from shards.images.names import IMAGE_FORMATS
from shards.inspection.shard_folder import ShardFolder

FILM_FRAMES = 8
"""Frames of a clip that are shown."""

EXAMPLES = 60
"""Samples, chosen at random, of which it is noted where they are."""


class Tally:
    """How often each number came. Of fractions four digits are told apart, so that there are not too many."""

    def __init__(self) -> None:
        self.values, self.counts = np.empty(0), np.empty(0, np.int64)

    def add(self, numbers: np.ndarray) -> None:
        """Count some more numbers, all above 0."""
        if np.issubdtype(numbers.dtype, np.floating):
            unit = 10.0 ** (np.floor(np.log10(numbers)) - 3)
            numbers = np.rint(numbers / unit) * unit
        values, counts = np.unique(numbers, return_counts=True)
        self.values, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([self.counts, counts])).astype(np.int64)

    def quantile(self, share: float) -> float:
        """The number that this share of all is not above."""
        ends = np.cumsum(self.counts)
        return float(self.values[np.searchsorted(ends, share * ends[-1])])


@dataclass(frozen=True)
class Example:
    """Where a sample is: its shard, its number and key there, and start and bytes of its image; of a clip of some
    frames (not more than FILM_FRAMES) and of the sound, if it has one.
    """

    shard: str
    number: int
    key: str
    span: tuple[int, int]
    frames: list[tuple[int, int]] = field(default_factory=list)
    sound: tuple[int, int] | None = None


@dataclass(frozen=True)
class Facts:
    """A shard folder, and of all its samples: counts by format and class, sides in pixels, megapixels, width / height,
    kilobytes. Of clips also: frames of each, motion of each frame, seconds of sound, and clips with sound.
    """

    location: str
    manifest: Manifest
    formats: dict[str, int]
    classes: dict[str, int]
    width: Tally = field(default_factory=Tally)
    height: Tally = field(default_factory=Tally)
    megapixels: Tally = field(default_factory=Tally)
    shape: Tally = field(default_factory=Tally)
    kilobytes: Tally = field(default_factory=Tally)
    frames: Tally = field(default_factory=Tally)
    motion: Tally = field(default_factory=Tally)
    sound: Tally = field(default_factory=Tally)
    examples: list[Example] = field(default_factory=list)


def gather(folder: ShardFolder) -> Facts:
    """Read what the indexes say.

    Raises:
        InputError: an index cannot be read.
    """
    manifest = folder.manifest
    chosen = _choose(manifest.num_samples)
    formats, classes = np.zeros(len(IMAGE_FORMATS), np.int64), np.zeros(len(manifest.classes), np.int64)
    facts = Facts(folder.location, manifest, {}, {})
    first = 0
    for shard, index in zip(manifest.shards, folder.indexes(), strict=True):
        formats += np.bincount(index.format, minlength=len(formats))
        classes += np.bincount(index.label[index.label >= 0], minlength=len(classes))
        _count(facts, index)
        for number in (chosen[(chosen >= first) & (chosen < first + len(index))] - first).tolist():
            facts.examples.append(_example(shard.name, index, number))
        first += len(index)
    facts.formats.update((name, count) for name, count in zip(IMAGE_FORMATS, formats.tolist(), strict=True) if count)
    facts.classes.update(zip(manifest.classes, classes.tolist(), strict=True))
    return facts


def _example(shard: str, index: ShardIndex, number: int) -> Example:
    span, clips = (index.offset.item(number), index.size.item(number)), index.clips
    if clips is None:
        return Example(shard, number, index.key(number), span)
    frames = clips.frames(number)
    chosen = np.unique(np.linspace(frames[0], frames[-1], min(FILM_FRAMES, len(frames))).round().astype(int))
    spans = [(clips.offset.item(frame), clips.size.item(frame)) for frame in chosen.tolist()]
    sound = (clips.sound_offset.item(number), clips.sound_size.item(number))
    return Example(shard, number, index.key(number), span, spans, sound if sound[1] else None)


def _choose(num_samples: int) -> np.ndarray:
    """Numbers of some samples, the same at every call."""
    return np.sort(np.random.default_rng(0).choice(num_samples, min(EXAMPLES, num_samples), replace=False))


def _count(facts: Facts, index: ShardIndex) -> None:
    facts.width.add(index.width)
    facts.height.add(index.height)
    facts.megapixels.add(index.width.astype(np.float64) * index.height / 1e6)
    facts.shape.add(index.width / index.height)
    facts.kilobytes.add(index.size / 1e3)
    if index.clips is not None:
        _count_clips(facts, index.clips)


def _count_clips(facts: Facts, clips: ClipColumns) -> None:
    """Motion of 0 is not shown: a frame without one before it has none, and a logarithm neither."""
    facts.frames.add(clips.num_frames())
    motion = clips.motion.astype(np.float64)
    facts.motion.add(motion[motion > 0])
    heard = clips.sound_samples[clips.sound_samples > 0] / clips.sound_rate[clips.sound_samples > 0]
    facts.sound.add(heard)


def summary_of(facts: Facts) -> str:
    """Counts, sizes, formats, resolutions, classes and what was skipped."""
    manifest = facts.manifest
    lines = [
        facts.location,
        f"  samples   {manifest.num_samples:,} in {len(manifest.shards):,} shards, {manifest.num_bytes:,} bytes",
        f"  source    {manifest.source}",
        f"  settings  {', '.join(f'{key}={value}' for key, value in manifest.settings.items())}",
        f"  formats   {', '.join(f'{name} {count:,}' for name, count in facts.formats.items())}",
        f"  pixels    {_spread(facts.width)} wide, {_spread(facts.height)} high (smallest / median / largest)",
        *_clips(facts),
        *_classes(facts),
        *(f"  skipped   {count:,}: {reason}" for reason, count in manifest.skipped.items()),
    ]
    return "\n".join(lines)


def _clips(facts: Facts) -> list[str]:
    if not len(facts.frames.values):
        return []
    frames = int(facts.frames.values @ facts.frames.counts)
    num_heard = int(facts.sound.counts.sum())
    seconds = float(facts.sound.values @ facts.sound.counts)
    return [
        f"  frames    {frames:,} in all; {_spread(facts.frames)} per clip",
        f"  sound     of {num_heard:,} clips, {seconds:,.0f} seconds" if num_heard else "  sound     none",
    ]


def _spread(sides: Tally) -> str:
    return f"{int(sides.values[0])} / {int(sides.quantile(0.5))} / {int(sides.values[-1])}"


def _classes(facts: Facts) -> list[str]:
    if not facts.manifest.classes:
        return ["  classes   none"]
    shown = [f"{name} {count:,}" for name, count in facts.classes.items()]
    more = len(shown) - 20
    return [f"  classes   {len(shown):,}: {', '.join(shown[:20])}{f', and {more:,} more' if more > 0 else ''}"]
